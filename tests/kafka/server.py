"""A real Apache Kafka for tests: one KRaft node in one JVM on loopback, from Maven's jars, without Docker.

It can be stopped, killed and started again on the same data and port. Also by hand:
`.venv/bin/python -m tests.kafka.server FOLDER` runs one until Ctrl-C and prints its address.
"""

from __future__ import annotations

import fcntl
import shutil
import signal
import subprocess
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from harness.processes import ServerProcess, free_ports

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "kafka"
START_SECONDS_MAX = 120.0  # 4 s, where nobody else is at work
FETCH_SECONDS_MAX = 600.0
# One small JVM that is soon there, on a machine that does other things.
JVM = ("-Xms64m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")

PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
num.network.threads=2
num.io.threads=2
num.recovery.threads.per.data.dir=2
background.threads=2
log.cleaner.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
group.initial.rebalance.delay.ms=0
group.consumer.min.heartbeat.interval.ms=300
group.consumer.heartbeat.interval.ms=300
group.consumer.min.session.timeout.ms=6000
group.consumer.session.timeout.ms=6000
auto.create.topics.enable=false
log.segment.bytes=16777216
log.retention.check.interval.ms=1000
broker.session.timeout.ms=1000
broker.heartbeat.interval.ms=200
"""

LOG4J = """
status=error
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %c{{1}} %m%n
rootLogger.level=warn
rootLogger.appenderRef.out.ref=out
"""


class KafkaNotStarted(Exception):
    """The broker did not come up; the message has the end of its log."""


@cache
def missing() -> str | None:
    """What this machine lacks for a real broker, in one line."""
    lacking = [name for name in ("java", "mvn") if shutil.which(name) is None]
    if lacking and not _is_fetched(_libs()):
        return f"needs Apache Kafka: no {' and no '.join(lacking)} (Debian: apt-get install default-jdk-headless maven)"
    if shutil.which("java") is None:
        return "needs Apache Kafka: no java (Debian: apt-get install default-jdk-headless)"
    try:
        fetch()
    except subprocess.SubprocessError as error:
        return f"needs Apache Kafka, and Maven could not fetch its jars: {_last_line(error)}"
    return None


def fetch() -> Path:
    """The folder with the broker's jars, fetched once; two at once wait for each other."""
    libs = _libs()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_fetched(libs):
            partial = libs.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            subprocess.run(
                ["mvn", "-B", "-q", "-f", str(HERE / "pom.xml"), "dependency:copy-dependencies",
                 "-DincludeScope=runtime", f"-DoutputDirectory={partial}"],
                check=True, capture_output=True, text=True, timeout=FETCH_SECONDS_MAX,
            )  # fmt: skip
            partial.rename(libs)
    return libs


def _libs() -> Path:
    return CACHE / ("libs-" + sha256((HERE / "pom.xml").read_bytes()).hexdigest()[:12])


def _is_fetched(libs: Path) -> bool:
    return libs.is_dir()


def _last_line(error: subprocess.SubprocessError) -> str:
    said = str(getattr(error, "stdout", "") or getattr(error, "stderr", "") or error)
    wrong = [line for line in said.splitlines() if "ERROR" in line] or [str(error)]
    return wrong[0][:200]


class KafkaServer(ServerProcess):
    """One broker on `folder` (its data, its log). `address` stays the same over restarts."""

    def __init__(self, folder: Path, **properties: str) -> None:
        self.folder = folder
        self.port, self.controller = free_ports(2)
        self.address = f"127.0.0.1:{self.port}"
        self.log = folder / "kafka.log"
        self._config = folder / "server.properties"
        folder.mkdir(parents=True, exist_ok=True)
        given = PROPERTIES.format(port=self.port, controller=self.controller, data=folder / "data")
        more = "".join(f"{name.replace('_', '.')}={value}\n" for name, value in properties.items())
        self._config.write_text(given + more)
        (folder / "log4j2.properties").write_text(LOG4J)

    def configure(self, more: str) -> None:
        """Further properties, before the start; the last one of a name counts."""
        self._config.write_text(self._config.read_text() + more)

    def start(self, *, wait: bool = True) -> KafkaServer:
        """Start it on what is in its folder, and wait until it answers. Raises KafkaNotStarted."""
        classpath = f"{fetch()}/*"
        log4j = f"-Dlog4j2.configurationFile={self.folder / 'log4j2.properties'}"
        if not (self.folder / "data" / "meta.properties").exists():
            arguments = ["format", "--standalone", "--cluster-id", "4L6g3nShT-eMCtK--X86sw", "--config", self._config]
            self._run("java", *JVM, log4j, "-cp", classpath, "kafka.tools.StorageTool", *map(str, arguments))
        with self.log.open("ab") as log:
            self._launch(["java", *JVM, log4j, "-cp", classpath, "kafka.Kafka", str(self._config)], output=log)
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        if not self._answers_within(START_SECONDS_MAX, every_seconds=0.05):
            self.kill()
            raise KafkaNotStarted(f"Kafka did not start:\n{self.log.read_text()[-2000:]}")

    def _answers(self) -> bool:
        if not super()._answers():
            return False
        try:
            admin = AdminClient({"bootstrap.servers": self.address, "log_level": 0, "socket.timeout.ms": 2000})
            return bool(admin.list_topics(timeout=2).brokers)
        except KafkaException:
            return False

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise KafkaNotStarted(f"{command[-5:]}: {done.stderr[-1000:] or done.stdout[-1000:]}")


def main() -> int:
    if lack := missing():
        print(lack, file=sys.stderr)  # noqa: T201
        return 1
    with KafkaServer(Path(sys.argv[1]).absolute()) as server:
        print(server.address, flush=True)  # noqa: T201
        for ends in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ends, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
