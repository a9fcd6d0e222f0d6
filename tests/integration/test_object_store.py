"""A bucket of S3: moto's server in place of Amazon's, read through s3fs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from tests.support.tiny_corpus import TEXTS, tokenizer

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")
pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")

pytestmark = pytest.mark.slow

SIZES = (
    "model.hidden_size=32 model.num_layers=1 model.num_heads=2 model.num_kv_heads=2 examples.max_length=32 batch.size=4"
)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty bucket named "bucket" at the endpoint that the environment names."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"), ("FIRTH_CACHE", str(tmp_path / "cache")),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
    yield tmp_path
    server.stop()


def firth(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "firth", *arguments], env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        cwd=folder, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_text_and_corpus_are_in_a_bucket(bucket: Path) -> None:
    """Text of a bucket is prepared, the corpus is copied to the bucket, and a run on its address has the losses of that on the disk."""
    import json

    import s3fs

    store = s3fs.S3FileSystem(skip_instance_cache=True)
    (bucket / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    store.put(str(bucket / "a.jsonl"), "bucket/text/a.jsonl")
    tokenizer().save(bucket / "tokenizer")
    made = ["--tokenizer", "tokenizer", "--workers", "1"]
    firth(bucket, "prepare", "s3://bucket/text/*.jsonl", "--out", "remote", *made)
    firth(bucket, "prepare", "a.jsonl", "--out", "local", *made)
    content = [json.loads((bucket / name / "corpus.json").read_text())["content"] for name in ("remote", "local")]
    assert content[0] == content[1]
    store.put(str(bucket / "local"), "bucket/corpus", recursive=True)
    losses = []
    for name, path in (("one", "s3://bucket/corpus"), ("other", "local")):
        firth(
            bucket,
            "train",
            "gpt",
            f"data.path={path}",
            *SIZES.split(),
            "budget.max_steps=4",
            "sample_prompts=[]",
            "--out",
            name,
        )
        rows = [json.loads(row) for row in (bucket / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) >= 4
    missing = subprocess.run(
        [sys.executable, "-m", "firth", "train", "gpt", "data.path=s3://nothing/corpus", "--out", "none"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}, cwd=bucket, capture_output=True, text=True,
    )  # fmt: skip
    assert missing.returncode != 0 and "s3://nothing/corpus: " in missing.stderr + missing.stdout
