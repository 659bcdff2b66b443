#!/usr/bin/env python3
"""Makes a leaf that is wrong in one way and right in every other, as an update could make it.

    forge_leaf.py FROM.db WRONG < the leaf as it stands, then the intermediate that the update made

Signs with the intermediate's own key, which lies in clear in the predecessor's database FROM.db and which the update
keeps. Writes the row's new text. Needs only the standard library and `cryptography`.
"""
import datetime as dt
import sqlite3
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

END = "-----END CERTIFICATE-----\n"


def pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def named(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def main():
    database, wrong = sys.argv[1:]
    blocks = [block + END for block in sys.stdin.read().split(END) if block.strip()]
    before, issuer = x509.load_pem_x509_certificate(blocks[0].encode()), x509.load_pem_x509_certificate(blocks[-1].encode())
    config = dict(sqlite3.connect(f"file:{database}?mode=ro", uri=True).execute("SELECT key, value FROM proxy_config"))
    key = serialization.load_pem_private_key(config["mastio_ca_key"].encode(), None)
    stranger = ec.generate_private_key(ec.SECP256R1())
    second = dt.timedelta(seconds=1)
    aki = x509.AuthorityKeyIdentifier.from_issuer_public_key
    subject, issuer_name, public_key, signer = before.subject, issuer.subject, before.public_key(), key
    serial, not_before, not_after = x509.random_serial_number(), before.not_valid_before_utc, before.not_valid_after_utc
    kept = [(e.value, e.critical) for e in before.extensions if e.oid != x509.AuthorityKeyIdentifier.oid]
    extensions = kept + [(aki(issuer.public_key()), False)]
    is_san = lambda extension: isinstance(extension[0], x509.SubjectAlternativeName)
    if wrong == "key":
        public_key = stranger.public_key()
    elif wrong == "not-after":
        not_after += second
    elif wrong == "not-before":
        not_before -= second
    elif wrong == "aki":
        extensions = kept + [(aki(stranger.public_key()), False)]
    elif wrong == "no-aki":
        extensions = kept
    elif wrong == "serial":
        serial = before.serial_number
    elif wrong == "san":
        other = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://cullis.local/legacy-org/other")])
        extensions = [(other, e[1]) if is_san(e) else e for e in extensions]
    elif wrong == "no-san":
        extensions = [e for e in extensions if not is_san(e)]
    elif wrong == "ca":
        extensions = [e for e in extensions if not isinstance(e[0], x509.BasicConstraints)]
        extensions.append((x509.BasicConstraints(True, None), True))
    elif wrong == "further-extension":
        extensions.append((x509.OCSPNoCheck(), False))
    elif wrong == "subject":
        subject = named("legacy-org::other")
    elif wrong == "issuer-name":
        issuer_name = named("another CA")
    elif wrong == "signature":
        signer = stranger
    elif wrong == "former-root":
        former = x509.load_pem_x509_certificate(config["org_ca_cert"].encode())
        signer = serialization.load_pem_private_key(config["org_ca_key"].encode(), None)
        issuer_name, extensions = former.subject, kept + [(aki(former.public_key()), False)]
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer_name).public_key(public_key)
    builder = builder.serial_number(serial).not_valid_before(not_before).not_valid_after(not_after)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    text = pem(builder.sign(signer, hashes.SHA256()))
    if wrong == "no-intermediate":
        print(text, end="")
    elif wrong == "private-key":
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        print(text + blocks[-1] + stranger.private_bytes(*form).decode(), end="")
    elif wrong == "former-leaf":
        print(blocks[0] + blocks[-1], end="")
    else:
        print(text + blocks[-1], end="")


main()
