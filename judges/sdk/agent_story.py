"""One agent, driven from outside through the unmodified `cullis-sdk`.

A long-lived process: a test writes one JSON object per line to stdin and reads one
JSON line back. It never restarts, so what it lives through, an update included,
it lives through as an agent does.

    {"cmd":"open","identity_dir":DIR,"ca":PEM,"mastio_url":URL,"agent_id":ID}
        builds a client with `from_identity_dir`, TLS verified against `ca`.
        DIR holds agent.crt and agent.key (or cert.pem and key.pem).
    {"cmd":"new-client"}             a second client object from the same files;
                                     keys given with it replace those of `open`
    {"cmd":"login"}                  an explicit login with the agent's own key
    {"cmd":"list"}                   the tools, as the SDK returns them
    {"cmd":"call","tool":NAME,"arguments":{}}
    {"cmd":"public-key","agent_id":ID}
    {"cmd":"peers"}
    {"cmd":"models"}
    {"cmd":"enroll","mastio_url":URL,"ca":PEM,"save_to":DIR,"requester_name":…,"requester_email":…}
        starts a dashboard approval and answers {"session_id":…} at once
    {"cmd":"enroll-wait"}            waits for the decision; then the new client is in use
    {"cmd":"enroll-byoca","mastio_url":URL,"ca":PEM,"admin_secret":…,"agent_name":…,
     "cert_pem":…,"private_key_pem":…,"persist_to":DIR}
    {"cmd":"enroll-spiffe",… "svid_pem":…,"svid_key_pem":…,"trust_bundle_pem":…,"persist_to":DIR}
    {"cmd":"login-proxy"}            a login with the key that the server holds
    {"cmd":"policy","principal_id":ID,"tool_name":NAME}
    {"cmd":"connector","config_dir":DIR}      a client as `from_connector` builds it; no lazy login
    {"cmd":"systemd","credentials_dir":DIR,"ca":PEM}
    {"cmd":"api-key-file"}           the client of `open` by the deprecated name of its constructor
    {"cmd":"state"}                  which SDK, which Python, the agent id, is there a token
    {"cmd":"quit"}

Answers: {"ok":true,"result":…} or {"ok":false,"type":CLASS,"error":TEXT,"warnings":[…]},
with "status" and "body" when an HTTP answer caused the error. Warnings that the SDK
raised on the way are in "warnings", for it goes on without mTLS after only a warning.
"""

import importlib.metadata
import json
import os
import platform
import queue
import sys
import threading
import warnings
from pathlib import Path

# Answers go to the real stdout; whatever the SDK prints goes to stderr.
ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
os.dup2(2, 1)

from cullis_sdk import CullisClient  # noqa: E402


class Story:
    def __init__(self):
        self.client = None
        self.settings = {}
        self.enrollment = None

    def open(self, request):
        self.settings = {key: value for key, value in request.items() if key != "cmd"}
        self.client = self.build()
        return self.state(request)

    def new_client(self, request):
        self.settings.update({key: value for key, value in request.items() if key != "cmd"})
        # The old object is dropped, not closed: an agent's other threads may still hold theirs.
        self.client = self.build()
        return self.state(request)

    def build(self):
        directory = Path(self.settings["identity_dir"])
        certificate, key = directory / "agent.crt", directory / "agent.key"
        if not certificate.exists():
            certificate, key = directory / "cert.pem", directory / "key.pem"
        ca = self.settings.get("ca")
        if ca is not None and not Path(ca).is_file():
            # The SDK would go on with the system's roots, and the story would not be ours.
            raise FileNotFoundError(f"no pinned CA at {ca}")
        return CullisClient.from_identity_dir(
            self.settings["mastio_url"],
            cert_path=certificate,
            key_path=key,
            agent_id=self.settings.get("agent_id"),
            verify_tls=True,
            timeout=self.settings.get("timeout_s", 10.0),
            ca_chain_path=ca,
        )

    def login(self, _request):
        self.client.login_via_proxy_with_local_key()
        return {"token": bool(self.client.token)}

    def list(self, _request):
        return self.client.list_mcp_tools()

    def call(self, request):
        return self.client.call_mcp_tool(request["tool"], request.get("arguments") or {})

    def public_key(self, request):
        return self.client.get_agent_public_key_via_egress(request["agent_id"])

    def peers(self, request):
        return self.client.list_peers(**request.get("arguments", {}))

    def models(self, _request):
        found = self.client.list_models()
        return found["data"] if isinstance(found, dict) else list(found)

    def enroll(self, request):
        started, finished = queue.Queue(), queue.Queue()
        options = {key: value for key, value in request.items() if key not in ("cmd", "mastio_url", "ca")}
        options.setdefault("poll_interval_s", 1.0)

        def run():
            try:
                client = CullisClient.enroll_via_dashboard_approval(
                    request["mastio_url"],
                    ca_chain_path=request.get("ca"),
                    on_pending=lambda session_id, url: started.put((session_id, url)),
                    **options,
                )
                finished.put((client, None))
            except Exception as error:
                finished.put((None, error))
                started.put(error)

        threading.Thread(target=run, daemon=True).start()
        self.enrollment = finished
        first = started.get(timeout=60)
        if isinstance(first, Exception):
            raise first
        self.settings = {
            "identity_dir": request["save_to"],
            "ca": request.get("ca"),
            "mastio_url": request["mastio_url"],
        }
        return {"session_id": first[0], "dashboard_url": first[1]}

    def enroll_wait(self, request):
        client, error = self.enrollment.get(timeout=request.get("timeout_s", 120))
        if error is not None:
            raise error
        self.client = client
        return self.state(request)

    def enroll_byoca(self, request):
        options = {key: value for key, value in request.items() if key not in ("cmd", "mastio_url", "ca")}
        self.client = CullisClient.enroll_via_byoca(
            request["mastio_url"], ca_chain_path=request.get("ca"), **options
        )
        return self.state(request)

    def enroll_spiffe(self, request):
        options = {key: value for key, value in request.items() if key not in ("cmd", "mastio_url", "ca")}
        self.client = CullisClient.enroll_via_spiffe(
            request["mastio_url"], ca_chain_path=request.get("ca"), **options
        )
        return self.state(request)

    def policy(self, request):
        return self.client.evaluate_tool_call_policy(
            principal_id=request["principal_id"], principal_type="agent", tool_name=request["tool_name"]
        )

    def connector(self, request):
        self.client = CullisClient.from_connector(request["config_dir"])
        return self.state(request)

    def systemd(self, request):
        self.client = CullisClient.from_systemd_credentials(
            credentials_dir=request["credentials_dir"], ca_chain_path=request["ca"]
        )
        return self.state(request)

    def api_key_file(self, request):
        directory = Path(self.settings["identity_dir"])
        names = ("agent.crt", "agent.key") if (directory / "agent.crt").exists() else ("cert.pem", "key.pem")
        with warnings.catch_warnings():
            # That it is deprecated is known; that it says more would be new.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.client = CullisClient.from_api_key_file(
                self.settings["mastio_url"],
                api_key_path=directory / "no-such-file",
                cert_path=directory / names[0],
                key_path=directory / names[1],
                agent_id=self.settings.get("agent_id"),
                ca_chain_path=self.settings["ca"],
            )
        return self.state(request)

    def login_proxy(self, _request):
        self.client.login_via_proxy()
        return {"token": bool(self.client.token)}

    def state(self, _request):
        return {
            "sdk": importlib.metadata.version("cullis-sdk"),
            "python": platform.python_version(),
            "pid": os.getpid(),
            "agent_id": getattr(self.client, "_proxy_agent_id", None),
            "token": bool(getattr(self.client, "token", None)),
        }


COMMANDS = {
    "open": Story.open,
    "new-client": Story.new_client,
    "login": Story.login,
    "list": Story.list,
    "call": Story.call,
    "policy": Story.policy,
    "public-key": Story.public_key,
    "peers": Story.peers,
    "models": Story.models,
    "enroll": Story.enroll,
    "enroll-wait": Story.enroll_wait,
    "enroll-byoca": Story.enroll_byoca,
    "enroll-spiffe": Story.enroll_spiffe,
    "login-proxy": Story.login_proxy,
    "policy": Story.policy,
    "connector": Story.connector,
    "systemd": Story.systemd,
    "api-key-file": Story.api_key_file,
    "state": Story.state,
}


def answer(story, line):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            request = json.loads(line)
            reply = {"ok": True, "result": COMMANDS[request["cmd"]](story, request)}
        except Exception as error:
            reply = {"ok": False, "type": type(error).__name__, "error": str(error)}
            response = getattr(error, "response", None)
            if response is not None:
                reply |= {"status": response.status_code, "body": response.text}
    if caught:
        reply["warnings"] = [f"{item.category.__name__}: {item.message}" for item in caught]
    return reply


def main():
    story = Story()
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            leaving = json.loads(line).get("cmd") == "quit"
        except (ValueError, AttributeError):
            leaving = False
        reply = {"ok": True, "result": None} if leaving else answer(story, line)
        ANSWERS.write(json.dumps(reply, default=str) + "\n")
        if leaving:
            return


if __name__ == "__main__":
    main()
