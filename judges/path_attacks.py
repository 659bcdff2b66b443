"""Certification paths that must not be believed: made, presented, and judged by others.

    path_attacks.py make FOLDER ORG_CA.crt ORG_CA.key MASTIO_CA.crt MASTIO_CA.key ORG TRUST_DOMAIN
        writes FOLDER/cases.json: a list of cases, the first of which are sound
    path_attacks.py present FOLDER URL
        presents each case in a TLS handshake and as the x5c of a token request, and
        writes what came of it beside it, with the verdicts of OpenSSL and pyca/cryptography
    path_attacks.py table FOLDER
        prints the table

Each case is registered for its agent by the test, as an operator's SQL could, so that
nothing stands between the path and its judge; where `registered` is another certificate
or absent, the registration is what has to refuse. A TLS client sends its chain too, but
the server takes the leaf alone and completes it itself, so what comes only along a chain
is no path there: `no_path`.
"""

import base64
import datetime
import hashlib
import http.client
import json
import ssl
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

sys.path.insert(0, str(Path(__file__).parent))
import verify_cryptography  # noqa: E402

warnings.simplefilter("ignore")
DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
CLIENT = [ExtendedKeyUsageOID.CLIENT_AUTH]
UNKNOWN = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")


def pem(certificate):
    if isinstance(certificate, bytes):
        return ssl.DER_cert_to_PEM_cert(certificate)
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def der(certificate):
    if isinstance(certificate, bytes):
        return certificate
    return certificate.public_bytes(serialization.Encoding.DER)


def key_pem(key):
    kind = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()).decode()


def name(common_name, organization=None):
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else []
    if organization:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(parts)


def usage(**set_bits):
    bits = dict.fromkeys(
        [
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
            "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        ],
        False,
    )
    return x509.KeyUsage(**(bits | set_bits))


# ------------------------------------------------------------------ DER by hand, for what no builder would write


def tlv(tag, *parts):
    body = b"".join(parts)
    if len(body) < 128:
        return bytes([tag, len(body)]) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + body


def elements(body):
    """The elements of a constructed value."""
    found = []
    while body:
        length, header = body[1], 2
        if length & 0x80:
            count = length & 0x7F
            length, header = int.from_bytes(body[2 : 2 + count], "big"), 2 + count
        found.append(body[: header + length])
        body = body[header + length :]
    return found


def content(element):
    length, header = element[1], 2
    if length & 0x80:
        header = 2 + (length & 0x7F)
    return element[header:]


def sign(key, message):
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(message, padding.PKCS1v15(), hashes.SHA256())
    return key.sign(message, ec.ECDSA(hashes.SHA256()))


def rebuilt(certificate, issuer_key, change):
    """The certificate with its fields changed and signed again. `change` gets and gives the elements of the
    TBSCertificate."""
    tbs, algorithm, _signature = elements(content(der(certificate)))
    changed = tlv(0x30, *change(elements(content(tbs))))
    return tlv(0x30, changed, algorithm, tlv(0x03, b"\x00", sign(issuer_key, changed)))


def signed_with(certificate, issuer_key, digest):
    """The certificate signed anew with an old digest: SHA-1 or SHA-224."""
    if isinstance(issuer_key, rsa.RSAPrivateKey):
        oid = {"sha1": "06092a864886f70d010105", "sha224": "06092a864886f70d01010e"}[digest.name]
        algorithm = tlv(0x30, bytes.fromhex(oid), b"\x05\x00")
    else:
        oid = {"sha1": "06072a8648ce3d0401", "sha224": "06082a8648ce3d040301"}[digest.name]
        algorithm = tlv(0x30, bytes.fromhex(oid))
    fields = elements(content(elements(content(der(certificate)))[0]))
    tbs = tlv(0x30, *(fields[:2] + [algorithm] + fields[3:]))
    with tempfile.TemporaryDirectory() as folder:
        key, message = Path(folder) / "key", Path(folder) / "message"
        key.write_text(key_pem(issuer_key))
        message.write_bytes(tbs)
        # pyca signs with neither any more.
        signature = subprocess.run(
            ["openssl", "dgst", f"-{digest.name}", "-sign", key, message], capture_output=True, check=True
        ).stdout
    return tlv(0x30, tbs, algorithm, tlv(0x03, b"\x00", signature))


def with_extensions(certificate, issuer_key, change):
    """The same, where `change` gets and gives the list of Extension elements."""

    def fields(tbs):
        extensions = elements(content(content(tbs[-1])))
        return tbs[:-1] + [tlv(0xA3, tlv(0x30, *change(extensions)))]

    return rebuilt(certificate, issuer_key, fields)


def extension(oid_der, value, critical=False):
    flag = b"\x01\x01\xff" if critical else b""
    return tlv(0x30, tlv(0x06, oid_der), flag, tlv(0x04, value))


# ------------------------------------------------------------------ the cast


class World:
    def __init__(self, org_ca, org_ca_key, mastio_ca, mastio_ca_key, org, trust_domain):
        self.root = x509.load_pem_x509_certificate(Path(org_ca).read_bytes())
        self.root_key = serialization.load_pem_private_key(Path(org_ca_key).read_bytes(), None)
        self.ca = x509.load_pem_x509_certificate(Path(mastio_ca).read_bytes())
        self.ca_key = serialization.load_pem_private_key(Path(mastio_ca_key).read_bytes(), None)
        self.org, self.trust_domain = org, trust_domain
        self.cases = []

    def spiffe(self, agent):
        return f"spiffe://{self.trust_domain}/{self.org}/{agent}"

    def leaf(self, agent, key, issuer=None, issuer_key=None, **options):
        """A sound leaf of `agent`, but for the options."""
        issuer = issuer if issuer is not None else self.ca
        issuer_key = issuer_key if issuer_key is not None else self.ca_key
        issuer_name = options.get("issuer_name", issuer.subject)
        builder = (
            x509.CertificateBuilder()
            .serial_number(x509.random_serial_number())
            .issuer_name(issuer_name)
            .subject_name(options.get("subject", name(f"{self.org}::{agent}", self.org)))
            .public_key(options.get("public_key", key.public_key()))
            .not_valid_before(options.get("not_before", NOW - DAY))
            .not_valid_after(options.get("not_after", NOW + 30 * DAY))
        )
        constraints = options.get("constraints", x509.BasicConstraints(False, None))
        if constraints is not None:
            builder = builder.add_extension(constraints, True)
        key_usage = options.get("key_usage", usage(digital_signature=True))
        if key_usage is not None:
            builder = builder.add_extension(key_usage, True)
        purposes = options.get("purposes", CLIENT)
        if purposes is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), False)
        names = options.get("names", [x509.UniformResourceIdentifier(self.spiffe(agent))])
        if names is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        for extra, critical in options.get("extra", []):
            builder = builder.add_extension(extra, critical)
        key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())
        try:
            own = issuer.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_KEY_IDENTIFIER).value
            key_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
        except (x509.ExtensionNotFound, ValueError):
            pass
        builder = builder.add_extension(key_id, False)
        signed = builder.sign(issuer_key, hashes.SHA256(), rsa_padding=options.get("padding"))
        return signed_with(signed, issuer_key, options["hash"]) if "hash" in options else signed

    def authority(self, common_name, key, issuer, issuer_key, **options):
        """A sound CA below `issuer`, but for the options."""
        builder = (
            x509.CertificateBuilder()
            .serial_number(x509.random_serial_number())
            .issuer_name(issuer.subject if issuer is not None else name(common_name))
            .subject_name(options.get("subject", name(common_name)))
            .public_key(key.public_key())
            .not_valid_before(options.get("not_before", NOW - DAY))
            .not_valid_after(options.get("not_after", NOW + 60 * DAY))
        )
        constraints = options.get("constraints", x509.BasicConstraints(True, 0))
        if constraints is not None:
            builder = builder.add_extension(constraints, True)
        key_usage = options.get("key_usage", usage(key_cert_sign=True, crl_sign=True))
        if key_usage is not None:
            builder = builder.add_extension(key_usage, True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        signer = issuer if issuer is not None else None
        key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        if signer is not None:
            try:
                own = signer.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_KEY_IDENTIFIER).value
                key_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
            except (x509.ExtensionNotFound, ValueError):
                pass
        builder = builder.add_extension(key_id, False)
        for extra, critical in options.get("extra", []):
            builder = builder.add_extension(extra, critical)
        signed = builder.sign(issuer_key, hashes.SHA256())
        if "hash" in options:
            signed = x509.load_der_x509_certificate(signed_with(signed, issuer_key, options["hash"]))
        return signed

    def case(self, what, mtls, token, chain, key, agent, why="", **options):
        """`mtls` and `token` are the stable reasons; None at a door where the case is no case."""
        leaf = chain[0]
        self.cases.append(
            {
                "what": what,
                "agent": f"{self.org}::{agent}",
                "subject": options.get("subject", f"{self.org}::{agent}"),
                "chain": [pem(certificate) for certificate in chain],
                "fingerprint": hashlib.sha256(der(leaf)).hexdigest(),
                "key": key_pem(key),
                "registered": pem(options["registered"]) if "registered" in options else pem(leaf),
                "state": options.get("state", "active"),
                "expected": {"mtls": mtls, "token": token},
                "why": why,
            }
        )


def p256():
    return ec.generate_private_key(ec.SECP256R1())


def make(world):
    number = iter(range(1, 1000))

    def next_agent():
        return f"path-{next(number):02}"

    # What the names of the identity say is ours to judge: a verifier of paths finds nothing wrong with them.
    ours = "the path is sound: who is registered for it is not a verifier's question"

    # ---------------------------------------------------------------- sound, so that refusals mean something
    key, agent = p256(), next_agent()
    world.case("sound: leaf alone", "", "", [world.leaf(agent, key)], key, agent, why="sound")
    key, agent = p256(), next_agent()
    world.case("sound: leaf and intermediate", "", "", [world.leaf(agent, key), world.ca], key, agent, why="sound")
    key, agent = p256(), next_agent()
    leaf = world.leaf(agent, key, world.root, world.root_key)
    world.case("sound: signed by the root itself", "", "", [leaf, world.root], key, agent, why="sound")

    # ---------------------------------------------------------------- who signed
    def simple(what, reason, why="", token=None, chain=None, **options):
        key, agent = p256(), next_agent()
        leaf = world.leaf(agent, key, **options)
        world.case(what, reason, token or reason, [leaf] + (chain or []), key, agent, why)

    key, agent = p256(), next_agent()
    leaf = world.leaf(agent, key, issuer_key=key, issuer_name=name(f"{world.org}::{agent}", world.org))
    world.case("self-signed leaf", "no_path", "no_path", [leaf], key, agent)
    foreign_key = p256()
    foreign = world.authority("Foreign CA", foreign_key, None, foreign_key, constraints=x509.BasicConstraints(True, None))
    simple("foreign root", "no_path", issuer=foreign, issuer_key=foreign_key, chain=[foreign])
    twin_key = p256()
    twin = world.authority(
        "", twin_key, None, twin_key, subject=world.root.subject, constraints=x509.BasicConstraints(True, 1)
    )
    twin = rebuilt(twin, twin_key, lambda tbs: tbs[:3] + [tbs[5]] + tbs[4:])
    twin = x509.load_der_x509_certificate(twin)
    simple("foreign root with our root's name", "bad_signature", issuer=twin, issuer_key=twin_key, chain=[twin])
    simple("the same, its root not sent", "bad_signature", issuer=twin, issuer_key=twin_key)
    twin_ca_key = p256()
    twin_ca = world.authority("", twin_ca_key, twin, twin_key, subject=world.ca.subject)
    simple(
        "foreign chain with both our names", "bad_signature", issuer=twin_ca, issuer_key=twin_ca_key,
        chain=[twin_ca, twin],
    )
    simple("foreign intermediate with our intermediate's name", "bad_signature", issuer=twin_ca, issuer_key=twin_ca_key)
    simple("signed by the intermediate, names the root", "bad_signature", issuer_name=world.root.subject)
    simple(
        "signed by the root, names the intermediate", "bad_signature", issuer=world.root, issuer_key=world.root_key,
        issuer_name=world.ca.subject,
    )
    simple("names an issuer that nobody has", "no_path", issuer_name=name("Nobody"))

    victim_key = p256()
    victim = world.leaf("victim", victim_key)

    def by_a_leaf(what, token, why="", issuer=None, mtls="no_path", issuer_key=victim_key):
        key, agent = p256(), next_agent()
        leaf = world.leaf(agent, key, issuer, issuer_key)
        world.case(what, mtls, token, [leaf, issuer], key, agent, why)

    by_a_leaf("an agent's leaf as issuer", "issuer_not_ca", issuer=victim)
    bare = world.leaf("victim", victim_key, constraints=None, key_usage=None, purposes=None)
    by_a_leaf("an agent's bare leaf as issuer, as the predecessor made them", "issuer_not_ca", issuer=bare)
    signing = world.leaf("victim", victim_key, key_usage=usage(digital_signature=True, key_cert_sign=True))
    by_a_leaf("a leaf with keyCertSign and without cA as issuer", "issuer_not_ca", issuer=signing)

    # ---------------------------------------------------------------- signatures
    def spoiled(what, reason, change, why="", token=None):
        key, agent = p256(), next_agent()
        leaf = change(world.leaf(agent, key))
        world.case(what, reason, token or reason, [leaf], key, agent, why)

    def flip(certificate):
        octets = bytearray(der(certificate))
        octets[-1] ^= 1
        return bytes(octets)

    spoiled("one bit of the signature flipped", "bad_signature", flip)

    def resubject(certificate):
        return der(certificate).replace(world.org.encode() + b"::path", world.org.encode() + b"::pith")

    spoiled("the subject changed after signing", "bad_signature", resubject)

    def without_signature(certificate):
        tbs, algorithm, _ = elements(content(der(certificate)))
        return tlv(0x30, tbs, algorithm, tlv(0x03, b"\x00"))

    spoiled("no signature at all", "bad_signature", without_signature)

    def other_algorithm(certificate):
        tbs, _, signature = elements(content(der(certificate)))
        sha384 = tlv(0x30, bytes.fromhex("06082a8648ce3d040303"))
        return tlv(0x30, tbs, sha384, signature)

    spoiled("two algorithm fields that differ", "malformed", other_algorithm)

    def md5_claimed(certificate):
        tbs, _, _signature = elements(content(der(certificate)))
        fields = elements(content(tbs))
        md5 = tlv(0x30, bytes.fromhex("06092a864886f70d010104"), b"\x05\x00")
        tbs = tlv(0x30, *(fields[:2] + [md5] + fields[3:]))
        return tlv(0x30, tbs, md5, tlv(0x03, b"\x00", b"\x00" * 512))

    spoiled("MD5 claimed", "bad_signature", md5_claimed)
    legacy = "OpenSSL leaves digests to its security level, whose default lets this one pass; ours are SHA-256 and longer"
    simple("signed with SHA-1", "bad_signature", hash=hashes.SHA1(), why=legacy)
    simple("signed with SHA-224", "bad_signature", hash=hashes.SHA224(), why=legacy)
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    simple(
        "signed with RSA-PSS", "bad_signature", issuer=world.root, issuer_key=world.root_key, padding=pss,
        why="sound by RFC 4055; no CA of this system signs so, and what is not needed is not accepted",
    )

    # ---------------------------------------------------------------- issuers below ours
    def below(what, token, why="", parent=None, parent_key=None, change=None, mtls="no_path", sub_key=None, **options):
        sub_key, key, agent = sub_key or p256(), p256(), next_agent()
        parent = parent if parent is not None else world.root
        parent_key = parent_key if parent_key is not None else world.root_key
        sub = world.authority(f"Sub CA {agent}", sub_key, parent, parent_key, **options)
        if change:
            sub = x509.load_der_x509_certificate(change(sub))
        leaf = world.leaf(agent, key, sub, sub_key)
        chain = [leaf, sub] + ([] if parent is world.root else [parent])
        world.case(what, mtls, token, chain, key, agent, why)

    below("a CA below the intermediate, whose pathLen is 0", "path_length_exceeded", parent=world.ca, parent_key=world.ca_key)
    middle_key = p256()
    middle = world.authority("Middle CA", middle_key, world.root, world.root_key)
    below("two CAs below the root, whose pathLen is 1", "path_length_exceeded", parent=middle, parent_key=middle_key)
    below("a CA with cA false", "issuer_not_ca", constraints=x509.BasicConstraints(False, None))
    below("a CA without basicConstraints", "issuer_not_ca", constraints=None)
    below("a CA without keyCertSign", "key_usage_forbids_signing", key_usage=usage(crl_sign=True))
    below("a CA with digitalSignature alone", "key_usage_forbids_signing", key_usage=usage(digital_signature=True))
    below("a CA that has expired", "expired", not_before=NOW - 9 * DAY, not_after=NOW - DAY)
    below("a CA that is not valid yet", "not_yet_valid", not_before=NOW + DAY)
    below(
        "a CA for servers alone", "extended_key_usage",
        extra=[(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)],
        why="extKeyUsage in a CA bounds what is below it (RFC 5280 §4.2.1.12 leaves it open)",
    )
    below("a CA with an unknown critical extension", "unknown_critical_extension", extra=[(x509.UnrecognizedExtension(UNKNOWN, b"\x05\x00"), True)])
    below(
        "a CA with critical policyConstraints", "unknown_critical_extension",
        extra=[(x509.PolicyConstraints(0, None), True)],
        why="policies are not implemented, so a critical word on them is not understood (RFC 5280 §4.2)",
    )
    other = x509.DirectoryName(name("", "Other"))
    below("a CA whose nameConstraints permit another directory name", "name_constraints", extra=[(x509.NameConstraints([other], None), True)])
    own = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{world.org}::path-00")]))
    elsewhere = x509.UniformResourceIdentifier("elsewhere.example")
    below(
        "a CA whose nameConstraints permit another trust domain", "name_constraints",
        extra=[(x509.NameConstraints([elsewhere], None), True)],
        why="constraints on URIs are refused rather than judged where a verifier does not implement them",
    )
    below("a CA signed with SHA-1", "bad_signature", hash=hashes.SHA1(), why=legacy)
    weak = rsa.generate_private_key(65537, 1024)
    below("a CA with an RSA key of 1024 bits", "bad_signature", sub_key=weak, why="OpenSSL leaves key sizes to its security level; ours are from 2048 bits on")
    p521 = ec.generate_private_key(ec.SECP521R1())
    below("a CA with a P-521 key", "bad_signature", sub_key=p521, why="sound; no CA of this system has such a key")

    def broken(oid, value, critical=True, key=None):
        def change(certificate):
            def replace(extensions):
                return [extension(oid, value, critical) if tlv(0x06, oid) in found else found for found in extensions]

            return with_extensions(certificate, key or world.root_key, replace)

        return change

    KU, BC, EKU, SAN = b"\x55\x1d\x0f", b"\x55\x1d\x13", b"\x55\x1d\x25", b"\x55\x1d\x11"
    below("a CA whose keyUsage cannot be read", "malformed", change=broken(KU, b"\x05\x00"))
    loop_a_key, loop_b_key = p256(), p256()
    loop_a = world.authority("Loop A", loop_a_key, None, loop_a_key)
    loop_b = world.authority("Loop B", loop_b_key, loop_a, loop_a_key)
    loop_a2 = world.authority("Loop A", loop_a_key, loop_b, loop_b_key)
    simple(
        "two CAs that vouch for each other", "no_path", token="path_length_exceeded", issuer=loop_a2,
        issuer_key=loop_a_key, chain=[loop_a2, loop_b],
    )
    many = []
    parent, parent_key = world.root, world.root_key
    for index in range(7):
        many_key = p256()
        many.append(world.authority(f"Many {index}", many_key, parent, parent_key, constraints=x509.BasicConstraints(True, None)))
        parent, parent_key = many[-1], many_key
    key, agent = p256(), next_agent()
    leaf = world.leaf(agent, key, parent, parent_key)
    too_many = "invalid client assertion: client assertion x5c is not one to six certificates in base64"
    world.case("a chain of nine", "no_path", too_many, [leaf] + many[::-1], key, agent)

    # ---------------------------------------------------------------- what the leaf says
    simple("expired", "expired", not_before=NOW - 9 * DAY, not_after=NOW - DAY)
    simple("expired a minute ago", "expired", not_before=NOW - 9 * DAY, not_after=NOW - datetime.timedelta(minutes=1))
    simple("not valid yet", "not_yet_valid", not_before=NOW + DAY)
    simple("valid from in an hour on", "not_yet_valid", not_before=NOW + datetime.timedelta(hours=1))

    def backwards(certificate):
        def swap(tbs):
            start, end = elements(content(tbs[4]))
            return tbs[:4] + [tlv(0x30, end, start)] + tbs[5:]

        return rebuilt(certificate, world.ca_key, swap)

    spoiled("ends before it begins", "malformed", backwards)
    simple("a leaf with cA", "leaf_is_ca", constraints=x509.BasicConstraints(True, None), why="a CA's certificate is no client's; OpenSSL lets it be one")
    simple(
        "a leaf with cA and keyCertSign", "leaf_is_ca", constraints=x509.BasicConstraints(True, 0),
        key_usage=usage(digital_signature=True, key_cert_sign=True), why="a CA's certificate is no client's; OpenSSL lets it be one",
    )
    simple("for servers alone", "extended_key_usage", purposes=[ExtendedKeyUsageOID.SERVER_AUTH])
    simple("for signing code alone", "extended_key_usage", purposes=[ExtendedKeyUsageOID.CODE_SIGNING])
    simple(
        "for any purpose", "extended_key_usage", purposes=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE],
        why="RFC 5280 §4.2.1.12 lets an application ask for its own purpose; this one does",
    )
    spoiled("for no purpose at all", "malformed", broken(EKU, b"\x30\x00", False, world.ca_key))
    simple("an unknown critical extension", "unknown_critical_extension", extra=[(x509.UnrecognizedExtension(UNKNOWN, b"\x05\x00"), True)])
    simple(
        "critical certificatePolicies", "unknown_critical_extension",
        extra=[(x509.CertificatePolicies([x509.PolicyInformation(UNKNOWN, None)]), True)],
        why="policies are not implemented, so a critical word on them is not understood (RFC 5280 §4.2)",
    )
    spoiled("basicConstraints that cannot be read", "malformed", broken(BC, b"\x05\x00", True, world.ca_key))
    spoiled(
        "keyUsage that cannot be read", "malformed", broken(KU, b"\x05\x00", True, world.ca_key),
        why="the judge's policy for agents' leaves does not look at keyUsage; OpenSSL does not read the certificate at all",
    )

    def version_1(certificate):
        return rebuilt(certificate, world.ca_key, lambda tbs: tbs[1:-1])

    spoiled("version 1", "malformed", version_1, why="version 1 says nothing of itself; RFC 5280 §4.1.2.1 wants 3")

    def two_sans(certificate):
        other = extension(SAN, tlv(0x30, tlv(0x86, world.spiffe("victim").encode())))
        return with_extensions(certificate, world.ca_key, lambda extensions: extensions + [other])

    spoiled("two SANs", "client_cert_no_identity", two_sans)
    spoiled("a SAN that cannot be read", "client_cert_no_identity", broken(SAN, b"\x05\x00", False, world.ca_key))

    # ---------------------------------------------------------------- who it says it is
    def other_name(what, reason, token=None, why=ours, **options):
        key, agent = p256(), next_agent()
        leaf = world.leaf(agent, key, **options)
        world.case(what, reason, token or reason, [leaf, world.ca], key, agent, why)

    uri = x509.UniformResourceIdentifier
    other_name("another organisation", "client_cert_org_mismatch", names=[uri(f"spiffe://{world.trust_domain}/other/bot")])
    other_name(
        "another organisation, by common name", "client_cert_org_mismatch", names=None, subject=name("other::bot"),
    )
    other_name("nobody", "client_cert_no_identity", names=None, subject=name("bot"))
    other_name("no name at all", "client_cert_no_identity", names=None, subject=name(""))
    other_name("a SPIFFE id of four parts", "client_cert_no_identity", names=[uri(world.spiffe("agent/bot/more"))])
    other_name("a colon that would spell another type", "client_cert_no_identity", names=[uri(world.spiffe("user::victim"))])
    key, agent = p256(), next_agent()
    leaf = world.leaf(agent, key, names=[uri(world.spiffe("victim")), uri(world.spiffe(agent))])
    world.case(
        "two SPIFFE ids, the victim's first", "client_cert_pin_mismatch", "client_cert_pin_mismatch", [leaf, world.ca],
        key, "victim", ours, registered=victim,
    )
    key = p256()
    forged = world.leaf("victim", key)
    world.case(
        "another certificate of our CA in the victim's name", "client_cert_pin_mismatch", "client_cert_pin_mismatch",
        [forged, world.ca], key, "victim", ours, registered=victim,
    )
    key, agent = p256(), next_agent()
    leaf = world.leaf(agent, key)
    world.case(
        "one's own certificate for another agent's token", None, "assertion_subject_mismatch", [leaf, world.ca], key,
        agent, ours, subject=f"{world.org}::victim",
    )
    key, agent = p256(), next_agent()
    leaf = world.leaf(agent, key, subject=name(f"{world.org}::victim", world.org))
    world.case(
        "the victim's common name beside one's own SPIFFE id", None, "assertion_subject_mismatch", [leaf, world.ca],
        key, agent, ours, subject=f"{world.org}::victim",
    )
    key, agent = p256(), next_agent()
    world.case(
        "an agent that does not exist", "agent_unknown_or_inactive", "agent_unknown_or_inactive",
        [world.leaf(agent, key), world.ca], key, agent, ours, state="absent",
    )
    key, agent = p256(), next_agent()
    world.case(
        "an agent that is set aside", "agent_unknown_or_inactive", "agent_unknown_or_inactive",
        [world.leaf(agent, key), world.ca], key, agent, ours, state="inactive",
    )
    key, agent = p256(), next_agent()
    world.case(
        "revoked", "client_cert_revoked", "client_cert_revoked", [world.leaf(agent, key), world.ca], key, agent,
        "without a list nobody else can know", state="revoked",
    )
    key, agent = p256(), next_agent()
    world.case(
        "superseded, its grace over", "client_cert_pin_mismatch", "client_cert_pin_mismatch",
        [world.leaf(agent, key), world.ca], key, agent, ours, registered=world.leaf(agent, key), state="superseded",
    )
    key, agent = p256(), next_agent()
    world.case(
        "a former key's certificate that an update superseded", "client_cert_pin_mismatch", "client_cert_pin_mismatch",
        [world.leaf(agent, key), world.ca], key, agent, ours, registered=world.leaf(agent, p256()),
        state="superseded_by_update",
    )
    world.case(
        "the intermediate itself as a client", "client_cert_no_identity", "client_cert_no_identity", [world.ca],
        world.ca_key, next_agent(),
    )


# ------------------------------------------------------------------ presenting


def reason_of(status, body):
    """The stable reason of an answer: the path's own where there is one."""
    if status == 200:
        return ""
    try:
        detail = json.loads(body).get("detail", "")
    except ValueError:
        return f"HTTP {status}"
    if isinstance(detail, dict):
        return detail.get("path") or detail.get("reason") or json.dumps(detail)
    return f"{detail}"


def handshake(folder, case, host, port):
    certificate, key = folder / "client.pem", folder / "client.key"
    certificate.write_text("".join(case["chain"]))
    key.write_text(case["key"])
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        return None, f"OpenSSL does not load it: {error.reason}"
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=60)
    try:
        connection.request("POST", "/v1/auth/login-challenge", headers={"Content-Length": "0"})
        answer = connection.getresponse()
        return answer.status, reason_of(answer.status, answer.read())
    except ssl.SSLError as error:
        return 0, f"alert: {error.reason}"
    finally:
        connection.close()


def token(case, host, port):
    from cullis_sdk.auth import build_dpop_proof, generate_dpop_keypair
    import jwt
    import uuid

    key = serialization.load_pem_private_key(case["key"].encode(), None)
    now = int(datetime.datetime.now(datetime.timezone.utc).timestamp())
    claims = {
        "sub": case["subject"], "iss": case["subject"], "aud": "agent-trust-broker", "iat": now, "exp": now + 300,
        "jti": str(uuid.uuid4()),
    }
    x5c = [base64.b64encode(ssl.PEM_cert_to_DER_cert(certificate)).decode() for certificate in case["chain"]]
    assertion = jwt.encode(claims, key, algorithm="ES256", headers={"x5c": x5c})
    url = f"https://{host}:{port}/v1/auth/token"
    proof = build_dpop_proof(*generate_dpop_keypair(), "POST", url)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=60)
    try:
        body = json.dumps({"client_assertion": assertion})
        connection.request("POST", "/v1/auth/token", body, {"Content-Type": "application/json", "DPoP": proof})
        answer = connection.getresponse()
        return answer.status, reason_of(answer.status, answer.read())
    finally:
        connection.close()


def openssl_says(folder, case, root, ca):
    (folder / "j-root.pem").write_text(root)
    (folder / "j-between.pem").write_text(ca + "".join(case["chain"][1:]))
    (folder / "j-leaf.pem").write_text(case["chain"][0])
    command = ["openssl", "verify", "-purpose", "sslclient", "-no-CAfile", "-no-CApath", "-no-CAstore", "-CAfile", "j-root.pem"]
    judged = subprocess.run(command + ["-untrusted", "j-between.pem", "j-leaf.pem"], cwd=folder, capture_output=True, text=True)
    if judged.returncode == 0:
        return "accepts"
    for line in judged.stderr.splitlines():
        if "lookup:" in line:
            return line.split("lookup:", 1)[1].strip()
    return (judged.stderr.strip().splitlines() or ["refuses"])[0][:60]


def cryptography_says(case, root, ca):
    try:
        roots = x509.load_pem_x509_certificates(root.encode())
        between = x509.load_pem_x509_certificates((ca + "".join(case["chain"][1:])).encode())
        leaf = x509.load_pem_x509_certificate(case["chain"][0].encode())
        verify_cryptography.judge(roots, between, leaf, "client")
    except Exception as refusal:  # whatever it raises, it does not believe the path
        text = f"{refusal}" or type(refusal).__name__
        return text.split("(encountered", 1)[0].strip()[:60]
    return "accepts"


def present(folder, url):
    host, port = url.removeprefix("https://").split(":")
    stored = json.loads((folder / "cases.json").read_text())
    for case in stored["cases"]:
        doors = {}
        if case["expected"]["mtls"] is not None:
            doors["mtls"] = handshake(folder, case, host, int(port))
        if case["expected"]["token"] is not None:
            doors["token"] = token(case, host, int(port))
        case["found"] = doors
        case["openssl"] = openssl_says(folder, case, stored["root"], stored["ca"])
        case["cryptography"] = cryptography_says(case, stored["root"], stored["ca"])
    (folder / "cases.json").write_text(json.dumps(stored))


def table(folder):
    stored = json.loads((folder / "cases.json").read_text())
    rows = [["case", "mTLS", "x5c", "OpenSSL", "cryptography", "where they differ"]]
    for case in stored["cases"]:
        found = case["found"]
        told = [
            "" if door not in found else f"{found[door][0]} {found[door][1]}".strip() for door in ("mtls", "token")
        ]
        rows.append([case["what"], *told, case["openssl"], case["cryptography"], case["why"]])
    for number, row in enumerate(rows):
        print("| " + " | ".join(row) + " |")
        if number == 0:
            print("|" + " --- |" * len(row))


def main():
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "make":
        world = World(*sys.argv[3:9])
        make(world)
        stored = {"root": pem(world.root), "ca": pem(world.ca), "cases": world.cases}
        (folder / "cases.json").write_text(json.dumps(stored))
        print(len(world.cases))
    elif command == "present":
        present(folder, sys.argv[3])
    elif command == "table":
        table(folder)
    else:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
