"""Verifies our word for a caller as a server behind the gateway would, by joserfc and our published keys.

    caller_word.py JWKS JWS

Prints {"header", "claims"}, or fails.
"""

import json
import sys
import time

from joserfc import jws
from joserfc.jwk import KeySet

keys = KeySet.import_key_set(json.loads(sys.argv[1]))
said = jws.deserialize_compact(sys.argv[2], keys, algorithms=["ES256"])
claims = json.loads(said.payload)
assert claims["iat"] - 5 <= time.time() < claims["exp"] + 5, claims
print(json.dumps({"header": said.headers(), "claims": claims}))
