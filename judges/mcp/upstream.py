"""An MCP server on the official Python SDK, to stand behind the gateway.

    upstream.py [--until 2025-11-25] [--stateless] [--json]

It has what the MCP project's conformance suite asks of a server, and what our own judges need besides: a counter that
each session has for itself, a slow tool that says how far it is and notices when it is taken back, resources that can
be followed. `--until 2025-11-25` leaves 2026-07-28 out; `--stateless` keeps no sessions; `--json` answers without
event streams.

Listens on a free port of 127.0.0.1, prints {"url":…} as its first line and serves until stdin closes.
"""

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import os
import secrets
import socket
import sys
import threading

import mcp_types as types
import uvicorn
from mcp.server.lowlevel import Server
from mcp.server.subscriptions import (
    InMemorySubscriptionBus,
    ListenHandler,
    PromptsListChanged,
    ResourceUpdated,
    ToolsListChanged,
)
from mcp.shared.exceptions import MCPError

# One red pixel, and an eighth of a millisecond of silence.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
WAV = base64.b64encode(b"RIFF\x25\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x40\x1f\0\0\1\0\x08\0data\1\0\0\0\x80").decode()
NOTHING = {"type": "object", "properties": {}}
STATE_KEY = secrets.token_bytes(32)

TOOLS, PROMPTS = {}, {}
BUS = InMemorySubscriptionBus()
COUNTS = {}
SUBSCRIBED = {}
TAKEN_BACK = []
EXTRA = []
HIDDEN = set()


def tool(name, description, schema=NOTHING):
    def keep(function):
        TOOLS[name] = (types.Tool(name=name, description=description, input_schema=schema), function)
        return function

    return keep


def session_id(ctx):
    return ctx.request.headers.get("mcp-session-id") if ctx.request else None


def text(value):
    return types.CallToolResult(content=[types.TextContent(type="text", text=value)])


def resource(uri, mime_type, value):
    contents = types.TextResourceContents(uri=uri, mime_type=mime_type, text=value)
    return types.EmbeddedResource(type="resource", resource=contents)


def image():
    return types.ImageContent(type="image", data=PNG, mime_type="image/png")


def strings(*names):
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": list(names)}


def elicit(message, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"method": "elicitation/create", "params": {"mode": "form", "message": message, "requestedSchema": schema}}


def sample(prompt, tokens):
    message = {"role": "user", "content": {"type": "text", "text": prompt}}
    return {"method": "sampling/createMessage", "params": {"messages": [message], "maxTokens": tokens}}


ROOTS = {"method": "roots/list", "params": {}}
NEEDED = {"elicitation/create": "elicitation", "sampling/createMessage": "sampling", "roots/list": "roots"}


def ask(ctx, requests, state=None):
    """What is needed before the request can be answered, of what the client can do (2026-07-28)."""
    able = ctx.session.client_capabilities
    able = able.model_dump(by_alias=True, exclude_none=True) if able else {}
    wanted = {key: request for key, request in requests.items() if NEEDED[request["method"]] in able}
    if not wanted:
        missing = {NEEDED[request["method"]]: {} for request in requests.values()}
        raise MCPError(-32021, "Missing required client capability", {"requiredCapabilities": missing})
    answer = {"resultType": "input_required", "inputRequests": wanted}
    if state is not None:
        answer["requestState"] = seal(state)
    return types.InputRequiredResult.model_validate(answer)


def seal(state):
    clear = base64.urlsafe_b64encode(json.dumps(state).encode()).decode()
    return f"{clear}.{hmac.new(STATE_KEY, clear.encode(), hashlib.sha256).hexdigest()}"


def opened(sealed):
    clear, _, mac = sealed.partition(".")
    if not hmac.compare_digest(mac, hmac.new(STATE_KEY, clear.encode(), hashlib.sha256).hexdigest()):
        raise MCPError(-32602, "requestState was not made here")
    return json.loads(base64.urlsafe_b64decode(clear))


def answered(params, key):
    """The client's answer under `key`, as plain JSON, if there is one of the right shape."""
    found = (params.input_responses or {}).get(key)
    return None if found is None else found.model_dump(mode="json", by_alias=True, exclude_none=True)


def filled(params, key, field):
    answer = answered(params, key)
    if not answer or answer.get("action") != "accept":
        return None
    return (answer.get("content") or {}).get(field)


@tool("test_simple_text", "One block of text")
async def simple_text(_ctx, _arguments, _params):
    return text("This is a simple text response for testing.")


@tool("test_image_content", "One image")
async def image_content(_ctx, _arguments, _params):
    return types.CallToolResult(content=[image()])


@tool("test_audio_content", "One sound")
async def audio_content(_ctx, _arguments, _params):
    return types.CallToolResult(content=[types.AudioContent(type="audio", data=WAV, mime_type="audio/wav")])


@tool("test_embedded_resource", "One resource in a result")
async def embedded_resource(_ctx, _arguments, _params):
    return types.CallToolResult(
        content=[resource("test://embedded-resource", "text/plain", "This is an embedded resource content.")]
    )


@tool("test_multiple_content_types", "Text, image and resource")
async def multiple_content_types(_ctx, _arguments, _params):
    words = types.TextContent(type="text", text="Multiple content types test:")
    data = resource("test://mixed-content-resource", "application/json", '{"test":"data","value":123}')
    return types.CallToolResult(content=[words, image(), data])


@tool("test_tool_with_logging", "Says what it does")
async def with_logging(ctx, _arguments, _params):
    for index, said in enumerate(["Tool execution started", "Tool processing data", "Tool execution completed"]):
        if index:
            await asyncio.sleep(0.05)
        await ctx.session.send_log_message(level="info", data=said, related_request_id=ctx.request_id)
    return text("Said three things")


@tool("test_error_handling", "Always fails")
async def error_handling(_ctx, _arguments, _params):
    answer = text("This tool intentionally returns an error for testing")
    answer.is_error = True
    return answer


@tool("test_tool_with_progress", "Says how far it is")
async def with_progress(ctx, _arguments, _params):
    for progress in (0, 50, 100):
        await ctx.session.report_progress(progress, 100)
        await asyncio.sleep(0.05)
    return text("Done")


@tool("test_sampling", "Asks the client's model", strings("prompt"))
async def sampling(ctx, arguments, _params):
    message = types.SamplingMessage(role="user", content=types.TextContent(type="text", text=arguments["prompt"]))
    answer = await ctx.session.create_message([message], max_tokens=100, related_request_id=ctx.request_id)
    return text(f"LLM response: {answer.content.text}")


async def elicited(ctx, message, schema):
    return await ctx.session.elicit_form(message, schema, related_request_id=ctx.request_id)


@tool("test_elicitation", "Asks the user", strings("message"))
async def elicitation(ctx, arguments, _params):
    schema = {
        "type": "object",
        "properties": {
            "username": {"type": "string", "description": "User's response"},
            "email": {"type": "string", "description": "User's email address"},
        },
        "required": ["username", "email"],
    }
    answer = await elicited(ctx, arguments["message"], schema)
    return text(f"User response: action={answer.action}, content={json.dumps(answer.content)}")


@tool("test_elicitation_sep1034_defaults", "Asks the user, with defaults")
async def elicitation_defaults(ctx, _arguments, _params):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "default": "John Doe"},
            "age": {"type": "integer", "default": 30},
            "score": {"type": "number", "default": 95.5},
            "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
            "verified": {"type": "boolean", "default": True},
        },
    }
    answer = await elicited(ctx, "Please look at the defaults", schema)
    return text(f"Elicitation completed: action={answer.action}, content={json.dumps(answer.content)}")


def titled(*pairs):
    return [{"const": value, "title": title} for value, title in pairs]


@tool("test_elicitation_sep1330_enums", "Asks the user to choose")
async def elicitation_enums(ctx, _arguments, _params):
    plain = ["option1", "option2", "option3"]
    single = titled(("value1", "First Option"), ("value2", "Second Option"), ("value3", "Third Option"))
    several = titled(("value1", "First Choice"), ("value2", "Second Choice"), ("value3", "Third Choice"))
    names = ["Option One", "Option Two", "Option Three"]
    schema = {
        "type": "object",
        "properties": {
            "untitledSingle": {"type": "string", "enum": plain},
            "titledSingle": {"type": "string", "oneOf": single},
            "legacyEnum": {"type": "string", "enum": ["opt1", "opt2", "opt3"], "enumNames": names},
            "untitledMulti": {"type": "array", "items": {"type": "string", "enum": plain}},
            "titledMulti": {"type": "array", "items": {"anyOf": several}},
        },
    }
    answer = await elicited(ctx, "Please choose", schema)
    return text(f"Elicitation completed: action={answer.action}, content={json.dumps(answer.content)}")


@tool("test_input_required_result_elicitation", "Needs a name")
async def needs_name(ctx, _arguments, params):
    name = filled(params, "user_name", "name")
    if name is None:
        return ask(ctx, {"user_name": elicit("What is your name?", name={"type": "string"})})
    return text(f"Hello, {name}!")


@tool("test_input_required_result_sampling", "Needs a model")
async def needs_model(ctx, _arguments, params):
    answer = answered(params, "capital_question")
    if not answer or "content" not in answer:
        return ask(ctx, {"capital_question": sample("What is the capital of France?", 100)})
    return text(f"The model says: {answer['content'].get('text')}")


@tool("test_input_required_result_list_roots", "Needs roots")
async def needs_roots(ctx, _arguments, params):
    answer = answered(params, "client_roots")
    if not answer or "roots" not in answer:
        return ask(ctx, {"client_roots": ROOTS})
    return text("Roots: " + ", ".join(root["uri"] for root in answer["roots"]))


@tool("test_input_required_result_request_state", "Needs a confirmation and its state")
async def needs_state(ctx, _arguments, params):
    confirmed = filled(params, "confirm", "ok")
    if confirmed is None or params.request_state is None:
        return ask(ctx, {"confirm": elicit("Please confirm", ok={"type": "boolean"})}, {"asked": "confirm"})
    assert opened(params.request_state) == {"asked": "confirm"}
    return text("state-ok")


@tool("test_input_required_result_tampered_state", "Needs its own state")
async def needs_own_state(ctx, _arguments, params):
    if params.request_state is None:
        return ask(ctx, {"confirm": elicit("Please confirm", ok={"type": "boolean"})}, {"asked": "once"})
    opened(params.request_state)
    return text("state-ok")


@tool("test_input_required_result_multiple_inputs", "Needs three things at once")
async def needs_three(ctx, _arguments, params):
    got = [answered(params, key) for key in ("user_name", "greeting", "client_roots")]
    if params.request_state is None or any(answer is None for answer in got):
        requests = {
            "user_name": elicit("What is your name?", name={"type": "string"}),
            "greeting": sample("Generate a greeting", 50),
            "client_roots": ROOTS,
        }
        return ask(ctx, requests, {"asked": 3})
    opened(params.request_state)
    return text("Got all three")


@tool("test_input_required_result_multi_round", "Needs two things one after the other")
async def needs_two(ctx, _arguments, params):
    state = opened(params.request_state) if params.request_state else {"round": 0}
    name, color = filled(params, "step1", "name"), filled(params, "step2", "color")
    if state["round"] == 0 or (state["round"] == 1 and name is None):
        request = elicit("Step 1: What is your name?", name={"type": "string"})
        return ask(ctx, {"step1": request}, {"round": 1})
    if state["round"] == 1 or color is None:
        request = elicit("Step 2: What is your favorite color?", color={"type": "string"})
        return ask(ctx, {"step2": request}, {"round": 2, "name": name or state.get("name")})
    return text(f"{state['name']} likes {color}")


@tool("test_input_required_result_capabilities", "Asks only what the client can do")
async def asks_what_can_be_done(ctx, _arguments, params):
    if not params.input_responses:
        requests = {
            "user_name": elicit("What is your name?", name={"type": "string"}),
            "greeting": sample("Generate a greeting", 50),
        }
        return ask(ctx, requests)
    return text("Got it")


@tool("test_missing_capability", "Needs sampling")
async def missing_capability(ctx, _arguments, params):
    if not params.input_responses:
        return ask(ctx, {"greeting": sample("Generate a greeting", 50)})
    return text("Got it")


@tool("test_streaming_elicitation", "Asks the user")
async def streaming_elicitation(ctx, _arguments, params):
    if filled(params, "user_name", "name") is None:
        return ask(ctx, {"user_name": elicit("What is your name?", name={"type": "string"})})
    return text("Got it")


@tool("test_logging_tool", "Logs, if anybody asked for it")
async def logging_tool(ctx, _arguments, _params):
    await ctx.session.send_log_message(level="info", data="Said", related_request_id=ctx.request_id)
    return text("Logged")


@tool("test_toggled", "Is there, and is not")
async def toggled(_ctx, _arguments, _params):
    return text("Here")


@tool("test_trigger_tool_change", "Takes a tool away, or brings it back")
async def trigger_tool_change(_ctx, _arguments, _params):
    HIDDEN.symmetric_difference_update({"test_toggled"})
    await BUS.publish(ToolsListChanged())
    return text("Changed")


@tool("test_trigger_prompt_change", "Takes a prompt away, or brings it back")
async def trigger_prompt_change(_ctx, _arguments, _params):
    HIDDEN.symmetric_difference_update({"test_toggled_prompt"})
    await BUS.publish(PromptsListChanged())
    return text("Changed")


@tool("count", "How often it was called in this session")
async def count(ctx, _arguments, _params):
    session = session_id(ctx)
    if session is None:
        return text("1")
    COUNTS[session] = COUNTS.get(session, 0) + 1
    return text(str(COUNTS[session]))


@tool("slow", "Takes so many steps of 50 ms", {"type": "object", "properties": {"steps": {"type": "integer"}}})
async def slow(ctx, arguments, _params):
    steps = arguments.get("steps", 3)
    try:
        for step in range(steps):
            await ctx.session.report_progress(step + 1, steps, f"step {step + 1}")
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        TAKEN_BACK.append(steps)
        raise
    return text(f"{steps} steps")


@tool("taken_back", "How many slow calls were taken back")
async def taken_back(_ctx, _arguments, _params):
    return text(str(len(TAKEN_BACK)))


@tool("touch", "Changes a resource", strings("uri"))
async def touch(_ctx, arguments, _params):
    await BUS.publish(ResourceUpdated(uri=arguments["uri"]))
    for session in list(SUBSCRIBED.get(arguments["uri"], {}).values()):
        await session.send_resource_updated(arguments["uri"])
    return text("Touched")


@tool("learn", "Learns a tool of this name", strings("name"))
async def learn(ctx, arguments, _params):
    EXTRA.append(types.Tool(name=arguments["name"], description="Was learnt", input_schema=NOTHING))
    await BUS.publish(ToolsListChanged())
    if ctx.protocol_version < "2026-07-28":
        await ctx.session.send_tool_list_changed()
    return text("Learnt")


def shown(known):
    return [definition for name, (definition, _) in known.items() if name not in HIDDEN]


async def list_tools(_ctx, _params):
    return types.ListToolsResult(tools=shown(TOOLS) + EXTRA)


async def call_tool(ctx, params):
    if params.name not in TOOLS:
        raise MCPError(-32602, f"Unknown tool: {params.name}")
    return await TOOLS[params.name][1](ctx, params.arguments or {}, params)


RESOURCES = [
    ("test://static-text", "text/plain", "This is the content of the static text resource."),
    ("test://static-binary", "image/png", None),
    ("test://watched-resource", "text/plain", "Watched"),
]


async def list_resources(_ctx, _params):
    listed = [
        types.Resource(uri=uri, name=uri.rpartition("/")[2], description=uri, mime_type=mime_type)
        for uri, mime_type, _ in RESOURCES
    ]
    return types.ListResourcesResult(resources=listed)


async def list_resource_templates(_ctx, _params):
    template = types.ResourceTemplate(
        uri_template="test://template/{id}/data", name="data", description="Data by id", mime_type="application/json"
    )
    return types.ListResourceTemplatesResult(resource_templates=[template])


async def read_resource(ctx, params):
    uri = params.uri
    for known, mime_type, value in RESOURCES:
        if uri == known and value is None:
            contents = types.BlobResourceContents(uri=uri, mime_type=mime_type, blob=PNG)
            return types.ReadResourceResult(contents=[contents])
        if uri == known:
            contents = types.TextResourceContents(uri=uri, mime_type=mime_type, text=value)
            return types.ReadResourceResult(contents=[contents])
    prefix, suffix = "test://template/", "/data"
    if uri.startswith(prefix) and uri.endswith(suffix):
        id = uri[len(prefix) : -len(suffix)]
        value = json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})
        contents = types.TextResourceContents(uri=uri, mime_type="application/json", text=value)
        return types.ReadResourceResult(contents=[contents])
    code = -32602 if ctx.protocol_version >= "2026-07-28" else -32002
    raise MCPError(code, "Resource not found", {"uri": uri})


async def subscribe_resource(ctx, params):
    SUBSCRIBED.setdefault(params.uri, {})[session_id(ctx)] = ctx.session
    return types.EmptyResult()


async def unsubscribe_resource(ctx, params):
    SUBSCRIBED.get(params.uri, {}).pop(session_id(ctx), None)
    return types.EmptyResult()


def prompt(name, description, *arguments):
    def keep(function):
        listed = [types.PromptArgument(name=argument, description=argument, required=True) for argument in arguments]
        PROMPTS[name] = (types.Prompt(name=name, description=description, arguments=listed), function)
        return function

    return keep


def messages(*contents):
    return types.GetPromptResult(messages=[types.PromptMessage(role="user", content=content) for content in contents])


def words(value):
    return types.TextContent(type="text", text=value)


@prompt("test_simple_prompt", "One message")
async def simple_prompt(_ctx, _params, _arguments):
    return messages(words("This is a simple prompt for testing."))


@prompt("test_prompt_with_arguments", "One message with two arguments", "arg1", "arg2")
async def prompt_with_arguments(_ctx, _params, arguments):
    return messages(words(f"Prompt with arguments: arg1='{arguments['arg1']}', arg2='{arguments['arg2']}'"))


@prompt("test_prompt_with_embedded_resource", "A resource and words", "resourceUri")
async def prompt_with_embedded_resource(_ctx, _params, arguments):
    return messages(
        resource(arguments["resourceUri"], "text/plain", "Embedded resource content for testing."),
        words("Please process the embedded resource above."),
    )


@prompt("test_prompt_with_image", "An image and words")
async def prompt_with_image(_ctx, _params, _arguments):
    return messages(image(), words("Please analyze the image above."))


@prompt("test_toggled_prompt", "Is there, and is not")
async def toggled_prompt(_ctx, _params, _arguments):
    return messages(words("Here"))


@prompt("test_input_required_result_prompt", "Needs a context")
async def prompt_that_needs_a_context(ctx, params, _arguments):
    context = filled(params, "user_context", "context")
    if context is None:
        request = elicit("What context should the prompt use?", context={"type": "string"})
        return ask(ctx, {"user_context": request})
    return messages(words(f"In the context of {context}"))


async def list_prompts(_ctx, _params):
    return types.ListPromptsResult(prompts=shown(PROMPTS))


async def get_prompt(ctx, params):
    if params.name not in PROMPTS:
        raise MCPError(-32602, f"Unknown prompt: {params.name}")
    return await PROMPTS[params.name][1](ctx, params, params.arguments or {})


async def completion(_ctx, _params):
    return types.CompleteResult(completion=types.Completion(values=["paris", "park"], total=2, has_more=False))


async def set_logging_level(_ctx, _params):
    return types.EmptyResult()


def until_2025(app):
    """The server as it was before 2026-07-28: it does not know that revision."""

    async def older(scope, receive, send):
        headers = dict(scope.get("headers") or [])
        if headers.get(b"mcp-protocol-version") == b"2026-07-28":
            body = b"Bad Request: Unsupported protocol version"
            start = {"type": "http.response.start", "status": 400, "headers": [(b"content-type", b"text/plain")]}
            await send(start)
            await send({"type": "http.response.body", "body": body})
            return
        await app(scope, receive, send)

    return older


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--until")
    parser.add_argument("--stateless", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    server = Server(
        "judge",
        version="1",
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        on_list_resources=list_resources,
        on_list_resource_templates=list_resource_templates,
        on_read_resource=read_resource,
        on_subscribe_resource=subscribe_resource,
        on_unsubscribe_resource=unsubscribe_resource,
        on_list_prompts=list_prompts,
        on_get_prompt=get_prompt,
        on_completion=completion,
        on_set_logging_level=set_logging_level,
        on_subscriptions_listen=ListenHandler(BUS),
    )
    app = server.streamable_http_app(json_response=options.json, stateless_http=options.stateless)
    if options.until:
        app = until_2025(app)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    # From here on a client may connect, and waits until it is served.
    listener.listen()
    config = uvicorn.Config(app, log_level="error", lifespan="on")
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"}), flush=True)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
