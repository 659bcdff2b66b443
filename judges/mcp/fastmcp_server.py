"""A server as FastMCP's users write them. Prints {"url":…} as its first line and serves until stdin closes."""

import json
import os
import socket
import sys
import threading
from dataclasses import dataclass

import uvicorn
from fastmcp import Context, FastMCP

server = FastMCP("orders")


@dataclass
class Order:
    id: int
    items: list[str]
    paid: bool


@server.tool
def add(a: int, b: int) -> int:
    """Adds two numbers"""
    return a + b


@server.tool
def order(id: int) -> Order:
    """An order by its number"""
    return Order(id=id, items=["tea", "größe"], paid=True)


@server.tool
def fail() -> str:
    """Fails"""
    raise ValueError("no such thing")


@server.tool
async def work(steps: int, ctx: Context) -> str:
    """Says how far it is"""
    for step in range(steps):
        await ctx.report_progress(step + 1, steps)
    return "done"


@server.resource("orders://recent")
def recent() -> str:
    """The last orders"""
    return "7, 8, 9"


@server.resource("orders://{id}/note")
def note(id: str) -> str:
    """The note of an order"""
    return f"note of {id}"


@server.prompt
def remind(customer: str) -> str:
    """A friendly reminder"""
    return f"Write a reminder to {customer}."


def main():
    app = server.http_app(path="/mcp")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    # From here on a client may connect, and waits until it is served.
    listener.listen()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"}), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on")).run(sockets=[listener])


if __name__ == "__main__":
    main()
