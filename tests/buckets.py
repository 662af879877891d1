"""An S3 of its own, which speaks the real protocol."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
KEYS |= {"AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """A URI with a place for a folder: ``uri.format("runs")``."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"endpoint_override={host}:{port}&scheme=http"
    fs.FileSystem.from_uri(f"s3://bucket?{endpoint}&allow_bucket_creation=true")[0].create_dir("bucket")
    yield f"s3://bucket/{{}}?{endpoint}"
    server.stop()
