"""Judges one certification path with pyca/cryptography.

    verify_cryptography.py ROOT.pem UNTRUSTED.pem LEAF.pem client|server

Prints "accept" or "reject: REASON" and exits 0 either way; exit 2 means that it
could not judge.

The library's own defaults are the Web PKI's. Ours is a private PKI: agent leaves
carry a SPIFFE URI and no extended key usage, as the predecessor issued them. So
the end entity policy is widened to that shape, and no further: a leaf may not be
a CA, and an extended key usage, where there is one, must hold the purpose. CA
certificates stay under the library's Web PKI defaults, and signatures, validity,
path length and algorithms are judged as always.
"""

import sys

from cryptography import x509
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from cryptography.x509.verification import Criticality, ExtensionPolicy

PURPOSES = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}


def end_entity_policy(purpose):
    def is_no_ca(_policy, _certificate, constraints):
        if constraints is not None and constraints.ca:
            raise ValueError("the leaf is a CA")

    def allows_purpose(_policy, _certificate, usage):
        if usage is not None and purpose not in usage:
            raise ValueError(f"extended key usage lacks {purpose.dotted_string}")

    return (
        ExtensionPolicy.permit_all()
        .require_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
        .may_be_present(x509.BasicConstraints, Criticality.AGNOSTIC, is_no_ca)
        .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, allows_purpose)
    )


def certification_authority_policy(lax):
    """The library's defaults; `lax` only serves to look past the first fault."""
    if not lax:
        return ExtensionPolicy.webpki_defaults_ca()
    return ExtensionPolicy.permit_all().require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)


def subject_of(leaf):
    """A server is always verified for a name, so take the leaf's own first one."""
    names = leaf.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    for name in names.get_values_for_type(x509.DNSName):
        return x509.DNSName(name)
    for address in names.get_values_for_type(x509.IPAddress):
        return x509.IPAddress(address)
    raise ValueError("the server leaf names neither a host nor an address")


def judge(roots, untrusted, leaf, purpose, lax=False):
    builder = (
        verification.PolicyBuilder()
        .store(verification.Store(roots))
        .extension_policies(
            ca_policy=certification_authority_policy(lax),
            ee_policy=end_entity_policy(PURPOSES[purpose]),
        )
    )
    if purpose == "client":
        verifier = builder.build_client_verifier()
    else:
        verifier = builder.build_server_verifier(subject_of(leaf))
    verifier.verify(leaf, untrusted)


def load(path):
    with open(path, "rb") as file:
        pem = file.read()
    return x509.load_pem_x509_certificates(pem) if pem.strip() else []


def main():
    root_path, untrusted_path, leaf_path, purpose = sys.argv[1:5]
    if purpose not in PURPOSES:
        raise SystemExit(2)
    try:
        roots, untrusted, leaves = load(root_path), load(untrusted_path), load(leaf_path)
        judge(roots, untrusted, leaves[0], purpose)
    except (verification.VerificationError, x509.ExtensionNotFound, ValueError) as refusal:
        reasons = [str(refusal)]
        try:
            judge(roots, untrusted, leaves[0], purpose, lax=True)
        except Exception as second:  # the verdict stands; this only names more of it
            if str(second) not in reasons:
                reasons.append(str(second))
        print("reject: " + "; ".join(reasons))
        return
    print("accept")


if __name__ == "__main__":
    try:
        main()
    except (OSError, IndexError, TypeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2)
