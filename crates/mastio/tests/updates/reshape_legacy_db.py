#!/usr/bin/env python3
"""Gives a legacy database defects that the stored fixtures do not show alone, or takes one away.

    reshape_legacy_db.py FROM.db TO.db [--keys FOLDER NEW_FOLDER] CHANGE...

--complete-leaves  every leaf of the Mastio's gets the full agent profile, for its own key
--bare-root        the Org CA loses its SubjectKeyIdentifier, for its own key
--new-root         the Org CA is replaced (pathLen=1, another key); the intermediate stays under the former one
--tag NAME=TAG     the enrollment tag of one agent

Needs only the standard library and `cryptography`; the keys in such a database lie there in clear.
"""
import argparse
import os
import shutil
import sqlite3

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

END = "-----END CERTIFICATE-----\n"


def pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def load(text):
    return x509.load_pem_x509_certificate(text.encode())


def usage(sign, ca):
    return x509.KeyUsage(sign, False, False, False, False, ca, ca, False, False)


def build(like, issuer, public_key, key, extensions):
    builder = (
        x509.CertificateBuilder()
        .subject_name(like.subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(like.not_valid_before_utc)
        .not_valid_after(like.not_valid_after_utc)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, hashes.SHA256())


def root(former, key, path_length, with_key_id):
    extensions = [(x509.BasicConstraints(True, path_length), True), (usage(True, True), True)]
    if with_key_id:
        extensions.append((x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False))
    return build(former, former.subject, key.public_key(), key, extensions)


def completed(leaf, issuer, key):
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return build(
        leaf,
        issuer.subject,
        leaf.public_key(),
        key,
        [
            (x509.BasicConstraints(False, None), True),
            (usage(True, False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
            (san, False),
            (x509.SubjectKeyIdentifier.from_public_key(leaf.public_key()), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), False),
        ],
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--keys", nargs=2, metavar=("FOLDER", "NEW_FOLDER"))
    parser.add_argument("--complete-leaves", action="store_true")
    parser.add_argument("--bare-root", action="store_true")
    parser.add_argument("--new-root", action="store_true")
    parser.add_argument("--tag", action="append", default=[])
    asked = parser.parse_args()
    shutil.copyfile(asked.source, asked.target)
    os.chmod(asked.target, 0o600)
    db = sqlite3.connect(asked.target)
    config = dict(db.execute("SELECT key, value FROM proxy_config"))

    def key(name):
        return serialization.load_pem_private_key(config[name].encode(), None)

    def set_config(name, value):
        config[name] = value
        db.execute("UPDATE proxy_config SET value = ? WHERE key = ?", (value, name))

    if asked.keys:
        os.makedirs(asked.keys[1])
        for name in os.listdir(asked.keys[0]):
            shutil.copyfile(os.path.join(asked.keys[0], name), os.path.join(asked.keys[1], name))
    if asked.complete_leaves:
        issuers = [(load(config["org_ca_cert"]), key("org_ca_key"))]
        if "mastio_ca_cert" in config:
            issuers.append((load(config["mastio_ca_cert"]), key("mastio_ca_key")))
        issuers = {certificate.subject: (certificate, signer) for certificate, signer in issuers}
        rows = db.execute(
            "SELECT agent_id, cert_pem FROM internal_agents WHERE enrollment_method NOT IN ('byoca', 'spiffe')"
        ).fetchall()
        for agent_id, text in rows:
            first, rest = text.split(END, 1)
            before = load(first + END)
            after = pem(completed(before, *issuers[before.issuer])) + rest
            db.execute("UPDATE internal_agents SET cert_pem = ? WHERE agent_id = ?", (after, agent_id))
            file = asked.keys and os.path.join(asked.keys[1], agent_id.split("::")[1] + ".crt")
            if file and os.path.exists(file):
                with open(file, "w") as out:
                    out.write(after)
    if asked.bare_root:
        former = load(config["org_ca_cert"])
        length = former.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        set_config("org_ca_cert", pem(root(former, key("org_ca_key"), length, False)))
    if asked.new_root:
        new = ec.generate_private_key(ec.SECP256R1())
        set_config("org_ca_cert", pem(root(load(config["org_ca_cert"]), new, 1, True)))
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        set_config("org_ca_key", new.private_bytes(*form).decode())
    for tag in asked.tag:
        name, value = tag.split("=")
        db.execute("UPDATE internal_agents SET enrollment_method = ? WHERE agent_id LIKE ?", (value, "%::" + name))
    db.commit()
    db.close()


if __name__ == "__main__":
    main()
