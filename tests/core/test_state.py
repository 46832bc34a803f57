import json
import os
import subprocess
import sys

import pytest

from gracile.core.state import (
    derive_seed,
    environment,
    sha256,
    write_atomic,
    write_atomic_with,
    write_json,
)


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "deep" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


def test_a_writer_that_fails_leaves_the_old_content_and_no_litter(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(tmp):
        tmp.write_bytes(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_atomic_with(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_kill_before_the_rename_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    code = (
        "import os, sys, pathlib\n"
        "from gracile.core.state import write_atomic_with\n"
        "write_atomic_with(pathlib.Path(sys.argv[1]),"
        " lambda t: (t.write_bytes(b'half'), os._exit(9)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert done.returncode == 9
    assert path.read_bytes() == b"old"


def test_json_that_others_could_not_read_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]}


def test_hash_of_text_is_that_of_its_bytes():
    # FIPS 180-2, appendix B.1
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256("abc") == sha256(b"abc") == known
    assert sha256("é") == sha256("é".encode())


def test_seeds_are_fixed_distinct_and_fit_63_bits():
    paths = [(0,), (1,), (0, "init"), (0, "epoch", 0), (0, "epoch", 1), (0, "epoch", "1"), (0, "")]
    seeds = [derive_seed(*p) for p in paths]
    assert len(set(seeds)) == len(paths)
    assert all(0 <= s < 2**63 for s in seeds)
    assert seeds == [derive_seed(*p) for p in paths]
    # worked out with another tool: sha256("(0, 'epoch', 1)")[:16] >> 1
    want = int(sha256("(0, 'epoch', 1)")[:16], 16) >> 1
    assert derive_seed(0, "epoch", 1) == want


def test_the_environment_is_json_and_names_torch():
    import torch

    got = environment()
    assert json.loads(json.dumps(got)) == got
    assert got["torch"] == torch.__version__
    assert got["threads"] == torch.get_num_threads()
