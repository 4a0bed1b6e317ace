"""Another file under the same name is another input; the same file in another folder is not."""

import gzip

from agd_vllm.input.fingerprint import HEAD_BYTES, fingerprint


def test_content_counts_and_the_folder_does_not(tmp_path):
    (tmp_path / "other").mkdir()
    first, copy = tmp_path / "rows.jsonl", tmp_path / "other/rows.jsonl"
    first.write_bytes(b"a" * (HEAD_BYTES + 10))
    copy.write_bytes(first.read_bytes())
    assert fingerprint(str(first)) == fingerprint(f"file://{copy}")
    copy.write_bytes(b"b" + first.read_bytes()[1:])
    assert fingerprint(str(first)) != fingerprint(str(copy))
    copy.write_bytes(first.read_bytes() + b"a")
    assert fingerprint(str(first)) != fingerprint(str(copy))


def test_compressed_files_are_taken_as_they_are(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n"))
    assert "rows.jsonl.gz" in fingerprint(str(path))
