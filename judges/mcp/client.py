"""An MCP client on the official Python SDK: does what it is told, and prints what it saw as one JSON object.

    client.py '{"url":…, "mode":"auto"|"legacy", "calls":[[TOOL,ARGUMENTS],…], "resources":[URI,…],
                "prompts":[[NAME,ARGUMENTS],…], "judge":true}'

`judge`: the server is upstream.py, and what only it has is tried too: a counter of each session, a slow call with
progress, one that is taken back, log messages, a question to the user, a resource that is followed.
"""

import asyncio
import json
import sys

import anyio
import mcp_types as types
from mcp import Client

WAIT_S = 20


def plain(model):
    value = model.model_dump(mode="json", by_alias=True, exclude_none=True)
    # Who says it, and for how long it holds, are ours where we say it, and the server's where it does.
    for name in ("_meta", "ttlMs", "cacheScope", "resultType", "nextCursor"):
        value.pop(name, None)
    return value


async def outcome(awaitable):
    try:
        return plain(await awaitable)
    except Exception as error:
        error = getattr(error, "error", error)
        return {"code": getattr(error, "code", None), "message": getattr(error, "message", str(error))}


def text(result):
    return result.content[0].text


class Story:
    def __init__(self, told):
        self.told = told
        self.said = []
        self.logged = []
        self.arrived = asyncio.Event()

    async def message(self, message):
        if isinstance(message, types.ResourceUpdatedNotification):
            self.said.append(str(message.params.uri))
            self.arrived.set()

    async def log(self, params):
        self.logged.append([params.level, params.data])

    async def elicit(self, _context, params):
        return types.ElicitResult(action="accept", content={"name": "Ada", "username": "ada", "email": "ada@example.com"})

    async def run(self):
        client = Client(
            self.told["url"],
            mode=self.told["mode"],
            message_handler=self.message,
            logging_callback=self.log,
            log_level="info",
            elicitation_callback=self.elicit,
            client_info=types.Implementation(name="judge", version="1"),
        )
        async with client:
            seen = {"revision": client.protocol_version}
            tools = await client.list_tools()
            seen["tools"] = sorted((plain(tool) for tool in tools.tools), key=lambda tool: tool["name"])
            seen["calls"] = [await outcome(client.call_tool(*call)) for call in self.told.get("calls", [])]
            if self.told.get("resources"):
                seen["resources"] = plain(await client.list_resources())
                seen["templates"] = plain(await client.list_resource_templates())
                seen["read"] = [await outcome(client.read_resource(uri)) for uri in self.told["resources"]]
            if self.told.get("prompts"):
                seen["prompts"] = plain(await client.list_prompts())
                seen["got"] = [await outcome(client.get_prompt(*prompt)) for prompt in self.told["prompts"]]
            if self.told.get("judge"):
                await self.judge(client, seen)
            return seen

    async def judge(self, client, seen):
        seen["counts"] = [text(await client.call_tool("count")) for _ in range(3)]
        steps = []

        async def progress(done, total, message):
            steps.append([done, total, message])

        seen["slow"] = plain(await client.call_tool("slow", {"steps": 3}, progress_callback=progress))
        seen["steps"] = list(steps)
        before = int(text(await client.call_tool("taken_back")))
        begun = asyncio.Event()

        async def first(_done, _total, _message):
            begun.set()

        call = asyncio.ensure_future(client.call_tool("slow", {"steps": 1200}, progress_callback=first))
        await asyncio.wait_for(begun.wait(), WAIT_S)
        call.cancel()
        await asyncio.wait([call], timeout=WAIT_S)
        with anyio.fail_after(WAIT_S):
            while int(text(await client.call_tool("taken_back"))) == before:
                await anyio.sleep(0.02)
        seen["taken_back"] = True
        modern = client.protocol_version >= "2026-07-28"
        if not modern:
            await client.set_logging_level("info")
        await client.call_tool("test_tool_with_logging")
        seen["logged"] = self.logged
        seen["asked"] = plain(
            await client.call_tool("test_input_required_result_elicitation")
            if modern
            else await client.call_tool("test_elicitation", {"message": "Who?"})
        )
        argument = {"name": "arg1", "value": "pa"}
        reference = types.PromptReference(type="ref/prompt", name="test_prompt_with_arguments")
        seen["completed"] = plain(await client.complete(reference, argument))
        seen["updated"] = await (self.listen(client) if modern else self.subscribe(client))

    async def listen(self, client):
        uri = "test://watched-resource"
        async with client.listen(resource_subscriptions=[uri]) as subscription:
            await client.call_tool("touch", {"uri": "test://static-text"})
            heard = asyncio.ensure_future(anext(aiter(subscription)))
            await self.until(client, uri, heard.done)
            return [str((await heard).uri)]

    async def subscribe(self, client):
        uri = "test://watched-resource"
        await client.subscribe_resource(uri)
        await client.call_tool("touch", {"uri": "test://static-text"})
        await self.until(client, uri, self.arrived.is_set)
        await client.unsubscribe_resource(uri)
        return sorted(set(self.said))

    async def until(self, client, uri, done):
        # A stream that a server is heard on may open a moment after the call that asked for it.
        with anyio.fail_after(WAIT_S):
            while not done():
                await client.call_tool("touch", {"uri": uri})
                await anyio.sleep(0.05)


print(json.dumps(asyncio.run(Story(json.loads(sys.argv[1])).run())))
