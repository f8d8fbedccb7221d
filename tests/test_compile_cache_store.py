"""The files of the compile cache: read as they were written, or not at all."""

import logging
import os
import re
import stat
import time

import pytest
import torch
from trace_helpers import assert_same

from neuron_ext.compiler import cache
from neuron_ext.compiler.cache import Entry, Store, open_store

KEY = "ab" * 32
OTHER = "cd" * 32
CODE = torch.arange(100, dtype=torch.uint8)
WEIGHTS = torch.arange(2 << 20, dtype=torch.int64).to(torch.uint8)


@pytest.fixture
def lines(caplog):
    """(level, text) of each line logged so far by neuron_ext."""
    caplog.set_level(logging.INFO, "neuron_ext")
    return lambda: [
        (one.levelname, one.getMessage()) for one in caplog.records if one.name == "neuron_ext"
    ]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, 10**9)


def _entry(code=CODE, **blobs):
    return Entry({"answer": 42}, {**blobs, "code": code})


def _path(folder, key=KEY):
    return folder / f"{key}.entry"


def _keys(folder):
    return sorted(path.stem for path in folder.glob("*.entry"))


@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS[:1000], WEIGHTS[:0]], ids=len)
@pytest.mark.parametrize("local", [True, False])
def test_an_entry_is_read_as_it_was_written(store, weights, local, monkeypatch):
    monkeypatch.setattr(cache, "_is_local", lambda _stream: local)
    written = _entry(weights=weights)
    store.write(KEY, written)
    read = store.read(KEY)
    assert read.fields == {"answer": 42}
    assert list(read.blobs) == ["weights", "code"]
    assert_same(read.blobs, written.blobs)
    assert read.digests == written.digests
    assert all(blob.data_ptr() % 64 == 0 for blob in read.blobs.values())
    assert store.read(OTHER) is None


def test_what_is_done_to_weights_in_memory_does_not_reach_the_file(store, tmp_path):
    store.write(KEY, _entry(weights=WEIGHTS))
    before = _path(tmp_path).read_bytes()
    store.read(KEY).blobs["weights"].zero_()
    assert _path(tmp_path).read_bytes() == before


def test_what_was_read_outlives_its_file(store, tmp_path):
    store.write(KEY, _entry(weights=WEIGHTS))
    read = store.read(KEY)
    store.write(KEY, _entry(weights=WEIGHTS * 0))
    replaced = store.read(KEY)
    _path(tmp_path).unlink()
    assert torch.equal(read.blobs["weights"], WEIGHTS)
    assert not replaced.blobs["weights"].any()


def _change(path, change):
    data = bytearray(path.read_bytes())
    path.unlink()
    path.write_bytes(change(data))


def _flip(position):
    def change(data):
        data[position] ^= 1
        return data

    return lambda path: _change(path, change)


def _cut(length):
    return lambda path: _change(path, lambda data: data[:length])


def _link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_flip(0), "its weights is damaged"),
        (_flip(len(WEIGHTS) - 1), "its weights is damaged"),
        (_flip(len(WEIGHTS) + 50), "its code is damaged"),
        (_flip(-100), "its header is damaged"),
        (_flip(-30), "its header is damaged"),
        (_flip(-40), "its header is damaged"),
        (_flip(-33), "it does not end as an entry ends"),
        (_flip(-56), "it does not end as an entry ends"),
        (_cut(0), "it is cut short"),
        (_cut(40), "it is cut short"),
        (_cut(-1), "it does not end as an entry ends"),
        (_cut(len(WEIGHTS)), "it does not end as an entry ends"),
        (lambda path: _change(path, lambda data: data + b"\0"), "it does not end as an entry ends"),
        (lambda path: path.chmod(0o620), "others than user"),
        (lambda path: path.chmod(0o602), "others than user"),
        (_link, "symbolic link"),
        (_pipe, "it is no regular file"),
    ],
    ids=range(17),
)
def test_an_entry_that_is_not_right_is_a_miss_and_replaced(damage, why, store, tmp_path, lines):
    store.write(KEY, _entry(weights=WEIGHTS))
    damage(_path(tmp_path))
    assert store.read(KEY) is None
    assert store.read(KEY) is None
    ((level, text),) = lines()
    assert level == "WARNING"
    assert re.match(rf"compile cache: '.*{KEY}.entry' is not used and will .*: .*{why}", text)
    store.write(KEY, _entry(weights=WEIGHTS))
    assert torch.equal(store.read(KEY).blobs["weights"], WEIGHTS)


def test_an_entry_of_another_key_or_user_is_a_miss(store, tmp_path, monkeypatch, lines):
    store.write(OTHER, _entry())
    _path(tmp_path, OTHER).rename(_path(tmp_path))
    assert store.read(KEY) is None
    assert "it is the entry of another key" in lines()[0][1]
    store.write(KEY, _entry())
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert store.read(KEY) is None


def test_only_the_owner_can_read_what_is_kept(store, tmp_path):
    store.write(KEY, _entry())
    assert stat.S_IMODE(_path(tmp_path).stat().st_mode) == 0o600


def test_what_was_used_least_recently_goes_first(tmp_path):
    size = len(WEIGHTS)
    store = Store(tmp_path, 4 * size)
    keys = [f"{i}{i}" * 32 for i in range(5)]
    for age, key in enumerate(keys[:3]):
        store.write(key, _entry(WEIGHTS))
        os.utime(_path(tmp_path, key), (age, age))
    assert store.read(keys[0]) is not None  # now the one used last
    store.write(keys[3], _entry(WEIGHTS))
    assert _keys(tmp_path) == [keys[0], keys[2], keys[3]]
    Store(tmp_path, 2 * size).write(keys[4], _entry(WEIGHTS))
    assert _keys(tmp_path) == [keys[4]]


def test_an_entry_above_the_limit_is_not_kept_and_takes_nobodys_place(tmp_path, lines):
    store = Store(tmp_path, len(WEIGHTS))
    store.write(KEY, _entry())
    store.write(OTHER, _entry(WEIGHTS))
    assert _keys(tmp_path) == [KEY]
    assert lines() == [
        (
            "WARNING",
            "compile cache: an entry of 0.0021 GB is more than NEURON_EXT_CACHE_MAX_GB allows",
        )
    ]


def test_a_full_disk_leaves_nothing_behind(tmp_path, fork_server):
    code = """
    import resource, pathlib, logging
    from neuron_ext.compiler.cache import Entry, Store
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    said = []
    logging.getLogger("neuron_ext").addHandler(logging.NullHandler())
    logging.getLogger("neuron_ext").addFilter(lambda record: said.append(record.getMessage()))
    store = Store(pathlib.Path(args[0]), 10**9)
    for _ in range(2):
        store.write("ab" * 32, Entry({}, {"code": torch.zeros(100000, dtype=torch.uint8)}))
    result = said
    """
    (line,) = fork_server.run(code, str(tmp_path))
    assert line.startswith(f"compile cache: nothing is kept in {str(tmp_path)!r}: ")
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_what_is_swept_later(store, tmp_path, fork_server):
    code = """
    import os, pathlib, sys, torch
    from neuron_ext.compiler.cache import Entry, Store
    os.replace = lambda *paths: os.kill(os.getpid(), 9)
    store = Store(pathlib.Path(sys.argv[1]), 10**9)
    store.write("ab" * 32, Entry({}, {"code": torch.zeros(100000, dtype=torch.uint8)}))
    """
    assert fork_server.run_to_exit(code, tmp_path).returncode == -9
    (left,) = tmp_path.iterdir()
    assert store.read(KEY) is None
    store.write(KEY, _entry())
    assert left.exists()  # for all that is known, somebody still writes it
    os.utime(left, (time.time() - 7200,) * 2)
    store.write(OTHER, _entry())
    assert not left.exists()
    assert _keys(tmp_path) == [KEY, OTHER]


# ------------------------------------------------------------------------------- the folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A compile cache for this test alone."""
    folder = tmp_path / "own"
    monkeypatch.setenv("NEURON_EXT_CACHE_DIR", str(folder))
    return folder


def test_the_folder_is_made_for_its_owner_alone(folder):
    open_store().write(KEY, _entry())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert _keys(folder) == [KEY]


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("NEURON_EXT_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for base, want in (
        (str(tmp_path / "xdg"), tmp_path / "xdg/neuron_ext"),
        ("", tmp_path / "home/.cache/neuron_ext"),
        ("relative", tmp_path / "home/.cache/neuron_ext"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        open_store().write(KEY, _entry())
        assert _keys(want) == [KEY]
        _path(want).unlink()


@pytest.mark.parametrize(("text", "size"), [("0.5", 500_000_000), ("2", 2_000_000_000)])
def test_the_limit_is_in_gigabytes(text, size, monkeypatch):
    monkeypatch.setenv("NEURON_EXT_CACHE_MAX_GB", text)
    assert open_store()._max_bytes == size
