"""A tiny MCP server to stand behind the gateway in tests. Standard library only.

    mcp_upstream.py [TOOL [FILE]]  the one tool's name, `echo` unless told; its description
                                   is what FILE holds at that moment, or, where that is a
                                   JSON object, the whole answer to tools/list: `error` in it
                                   is a JSON-RPC error's message
    mcp_upstream.py TOOL "" CERT KEY CLIENT_CA
                                   over TLS, to clients with a certificate of that CA alone

Listens on a free port of 127.0.0.1, prints {"port":N,"url":…} as its first line and
serves POST requests with plain JSON until stdin closes, so a test that dies takes
it along. It answers initialize, tools/list and tools/call; a call returns its
arguments as one text block of compact JSON. Arguments named below make it fail on
purpose. It keeps nothing of what it is asked, headers least of all, except that a
call with `{"__headers__":true}` gets the header names of its own request back: a
test asks with it what the gateway let through.

    {"__error__":TEXT}      a JSON-RPC error        {"__is_error__":true}   a result with isError
    {"__status__":N}        that HTTP status        {"__sleep_s__":N}       answers late
    {"__headers__":true}    the header names of this request
"""

import http.server
import json
import pathlib
import ssl
import sys
import threading
import time

BODY_BYTES_MAX = 4 * 1024 * 1024
TOOL = sys.argv[1] if len(sys.argv) > 1 else "echo"
DESCRIPTION = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 and sys.argv[2] else None


class Refused(Exception):
    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def initialize(params, _headers):
    return {
        "protocolVersion": params.get("protocolVersion", "2025-06-18"),
        "capabilities": {"tools": {}},
        "serverInfo": {"name": "test-upstream", "version": "1"},
    }


def list_tools(_params, _headers):
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    description = DESCRIPTION.read_text() if DESCRIPTION else "Returns its arguments."
    if description.startswith("{"):
        whole = json.loads(description)
        if "error" in whole:
            raise Refused(-32000, whole["error"])
        return whole
    return {"tools": [{"name": TOOL, "description": description, "inputSchema": schema}]}


def call_tool(params, headers):
    if params.get("name") != TOOL and not DESCRIPTION:
        raise Refused(-32602, f"Unknown tool: {params.get('name')}")
    arguments = params.get("arguments") or {}
    if "__sleep_s__" in arguments:
        time.sleep(min(float(arguments["__sleep_s__"]), 60.0))
    if "__error__" in arguments:
        raise Refused(-32000, str(arguments["__error__"]))
    said = sorted({name.lower() for name in headers}) if arguments.get("__headers__") else arguments
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False)
    return {
        "content": [{"type": "text", "text": text}],
        "isError": bool(arguments.get("__is_error__")),
    }


METHODS = {"initialize": initialize, "tools/list": list_tools, "tools/call": call_tool, "ping": lambda _p, _h: {}}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body go out in two writes; without this the second waits 40 ms for an ACK.
    disable_nagle_algorithm = True

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        if length > BODY_BYTES_MAX:
            self.close_connection = True
            return self.reply(413, None)
        try:
            request = json.loads(self.rfile.read(length))
            method, request_id = request["method"], request.get("id")
        except (ValueError, KeyError, TypeError):
            return self.reply(400, {"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "Parse error"}})
        if request_id is None:
            return self.reply(202, None)
        params = request.get("params") or {}
        status = 200
        if method == "tools/call":
            status = int((params.get("arguments") or {}).get("__status__", 200))
        reply = {"jsonrpc": "2.0", "id": request_id}
        try:
            if method not in METHODS:
                raise Refused(-32601, f"Method not found: {method}")
            reply["result"] = METHODS[method](params, self.headers)
        except Refused as refusal:
            reply["error"] = {"code": refusal.code, "message": str(refusal)}
        self.reply(status, reply)

    def do_GET(self):
        self.reply(405, None)

    def reply(self, status, document):
        body = b"" if document is None else json.dumps(document, ensure_ascii=False).encode()
        self.send_response(status)
        if body:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments):
        """Records nothing."""


def main():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    scheme = "http"
    if len(sys.argv) > 3:
        cert, key, client_ca = sys.argv[3:6]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        scheme = "https"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    print(json.dumps({"port": port, "url": f"{scheme}://127.0.0.1:{port}/mcp"}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
