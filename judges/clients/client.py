"""Connects to localhost over TLS by Python's ssl, as an agent's author would, and prints what became of it.

    client.py plain|strict PORT CA_FILE

`strict` sets VERIFY_X509_STRICT, which Python 3.13 sets by itself; `plain` takes it off.
Exit code 0: connected and verified; 1: refused, with the reason.
"""

import socket
import ssl
import sys

mode, port, ca_file = sys.argv[1:]
context = ssl.create_default_context(cafile=ca_file)
if mode == "strict":
    context.verify_flags |= ssl.VERIFY_X509_STRICT
else:
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
try:
    with socket.create_connection(("localhost", int(port)), timeout=20) as connection:
        with context.wrap_socket(connection, server_hostname="localhost") as tls:
            print("connected", tls.version())
except ssl.SSLError as error:
    sys.exit(f"refused: {error.reason or error}: {getattr(error, 'verify_message', '')}")
