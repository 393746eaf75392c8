"""Certificates for tests, made with the openssl command and laid out as QEMU and nbdkit have them."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

CLIENTS = ("client", "revoked", "foreign")

_AUTHORITY = """
[ca]
default_ca = here
[here]
database = index.txt
default_md = sha256
default_crl_days = 2
"""


class Certificates(NamedTuple):
    """Directories. ``client`` has all that a client needs; ``nameless`` has no certificate; ``revoked``'s is in the server's
    ``ca-crl.pem``; ``foreign``'s is another authority's."""

    server: Path
    client: Path
    nameless: Path
    revoked: Path
    foreign: Path


def make_certificates(place: Path) -> Certificates:
    """All of them, in ``place``. They are made once for each process."""
    shutil.copytree(_made(), place)
    return Certificates(*(place / name for name in Certificates._fields))


@functools.cache
def _made() -> Path:
    place = Path(_place().name)
    (place / "ca.conf").write_text(_AUTHORITY)
    (place / "index.txt").write_text("")
    for name in ("ca", "other"):
        key = f"-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {name}-key.pem"
        uses = "-addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign"
        _openssl(place, f"req -x509 -subj /CN={name} -days 2 -out {name}-cert.pem {key} {uses}")
    for name in Certificates._fields:
        (place / name).mkdir()
        shutil.copy(place / "ca-cert.pem", place / name)
        if name != "nameless":
            _sign(place, name, "server" if name == "server" else "client", "other" if name == "foreign" else "ca")
    authority = "ca -config ca.conf -keyfile ca-key.pem -cert ca-cert.pem"
    _openssl(place, f"{authority} -revoke revoked/client-cert.pem")
    _openssl(place, f"{authority} -gencrl -out server/ca-crl.pem")
    return place


@functools.cache
def _place() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cowkit-certificates-")


def _sign(place: Path, directory: str, role: str, authority: str) -> None:
    key = f"-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {directory}/{role}-key.pem"
    names = "-addext subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
    _openssl(place, f"req -new -subj /CN={directory} -out request.pem {key} {names}")
    signing = f"-CA {authority}-cert.pem -CAkey {authority}-key.pem -CAcreateserial -copy_extensions copy"
    _openssl(place, f"x509 -req -in request.pem -out {directory}/{role}-cert.pem -days 2 {signing}")


def _openssl(place: Path, arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=place, check=True, capture_output=True)


def uri_with(uri: str, certificates: Path) -> str:
    """``uri`` for libnbd's programs, with a client's directory of certificates."""
    return f"{uri}{'&' if '?' in uri else '?'}tls-certificates={certificates}"
