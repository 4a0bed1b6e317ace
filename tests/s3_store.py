"""An S3 server on this machine (moto), which answers one request at a time: S3's conditional writes are atomic."""

import logging
import threading
from dataclasses import dataclass

import fsspec
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
# Of servers that are not Amazon's: conditions that are not looked at, not implemented, or refused without their name.
KINDS = ("", "ignores conditions", "knows no conditions", "names no condition")


class Server:
    """All kinds serve the same objects, each at an address of its own."""

    def __init__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._busy = threading.Lock()
        self._servers = {kind: make_server("127.0.0.1", 0, self._answering(kind), threaded=True) for kind in KINDS}
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def environment(self, kind: str) -> dict[str, str]:
        """Of a client, as a user sets it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._servers[kind].port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()

    def _answering(self, kind: str):
        def answer(environ, start_response):
            conditional = "HTTP_IF_NONE_MATCH" in environ
            if conditional and kind == "ignores conditions":
                del environ["HTTP_IF_NONE_MATCH"]
            if conditional and kind == "knows no conditions":
                start_response("501 Not Implemented", [("Content-Type", "application/xml")])
                return [b"<Error><Code>NotImplemented</Code><Message>A header is not implemented</Message></Error>"]
            with self._busy:
                body = b"".join(self._moto(environ, start_response))
            unnamed = body.replace(b"<Condition>If-None-Match</Condition>", b"")
            return [unnamed.ljust(len(body)) if kind == "names no condition" else body]

        return answer


@dataclass(frozen=True)
class Store:
    """A folder of a bucket that no other test uses, and how a client of another process reaches it."""

    url: str
    environment: dict[str, str]

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        fs, _ = fsspec.url_to_fs(self.url)
        fs.invalidate_cache()
        return fs

    def names(self, folder: str = "") -> list[str]:
        found = self.fs.find(f"{self.url}/{folder}".rstrip("/"))
        return sorted(
            path.removeprefix(f"{self.url}/{folder}".removeprefix("s3://").rstrip("/") + "/") for path in found
        )

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(f"{self.url}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.url}/{name}", data)

    def move(self, name: str, new: str) -> None:
        self.fs.mv(f"{self.url}/{name}", f"{self.url}/{new}")


@pytest.fixture(scope="session")
def s3_server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, request, monkeypatch, tmp_path):
    """A Store of the kind that the test names as this fixture's parameter, else one such as Amazon's."""
    environment = s3_server.environment(getattr(request, "param", ""))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()  # instances keep the address that they were made with
    fsspec.filesystem("s3").makedirs(BUCKET, exist_ok=True)
    yield Store(f"s3://{BUCKET}/{tmp_path.name}", environment)
    kind.clear_instance_cache()
