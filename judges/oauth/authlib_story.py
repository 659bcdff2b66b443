"""An OAuth client by others in Python: discovers, gets a token, uses it, has it introspected, gives it back.

    authlib_story.py '{"url", "agent_id", "cert", "key", "ca", "tool", "resource_server_id", "client_secret"}'

Authlib knows no DPoP: the token is bound to the client certificate of the connection (RFC 8705). The client
authenticates by `private_key_jwt`. Prints one JSON object; any surprise ends it with an error.
"""

import json
import sys

from authlib.integrations.requests_client import OAuth2Session
from authlib.oauth2.rfc7523 import PrivateKeyJWT
from joserfc.jwk import ECKey
import requests

settings = json.loads(sys.argv[1])
url, ca = settings["url"], settings["ca"]
pair = (settings["cert"], settings["key"])

server = requests.get(f"{url}/.well-known/oauth-authorization-server", verify=ca, timeout=10).json()
resource = requests.get(f"{url}/.well-known/oauth-protected-resource/v1/mcp", verify=ca, timeout=10).json()
assert resource["authorization_servers"] == [server["issuer"]], resource
assert "private_key_jwt" in server["token_endpoint_auth_methods_supported"], server

with open(settings["key"], encoding="ascii") as file:
    key = ECKey.import_key(file.read())
authentication = PrivateKeyJWT(server["token_endpoint"], alg="ES256")
agent = OAuth2Session(
    settings["agent_id"], key, token_endpoint_auth_method=authentication,
    revocation_endpoint_auth_method=authentication, scope="local",
)
agent.verify, agent.cert = ca, pair

token = agent.fetch_token(server["token_endpoint"], grant_type="client_credentials", resource=resource["resource"])
message = {
    "jsonrpc": "2.0", "id": 1, "method": "tools/call",
    "params": {"name": settings["tool"], "arguments": {"said": "hello"}},
}


def use(session):
    return session.post(resource["resource"], json=message, verify=ca, timeout=10)


used = use(agent)
assert used.status_code == 200, used.text

thief = requests.Session()
thief.headers["Authorization"] = f"Bearer {token['access_token']}"
stolen = use(thief)

asker = OAuth2Session(
    settings["resource_server_id"], settings["client_secret"], token_endpoint_auth_method="client_secret_basic"
)
asker.verify = ca


def ask():
    answer = asker.introspect_token(server["introspection_endpoint"], token=token["access_token"])
    assert answer.status_code == 200, answer.text
    return answer.json()


before = ask()
revoked = agent.revoke_token(server["revocation_endpoint"], token=token["access_token"])
assert revoked.status_code == 200, revoked.text
after = ask()
print(json.dumps({
    "said": used.json()["result"]["content"][0]["text"],
    "token_type": token["token_type"],
    "stolen": stolen.status_code,
    "active": [before["active"], after["active"]],
    "bound": sorted(before["cnf"]),
    "after": use(agent).status_code,
}))
