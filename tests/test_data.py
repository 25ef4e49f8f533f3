"""Data sets from small IDX files, and their downloads from a server on this machine."""

import functools
import gzip
import hashlib
import http.server
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from absynth import data, idx
from absynth.errors import InputError

TEST_IMAGES, TEST_LABELS = idx.FILES["test"]


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def small_set(seed):
    """The four files of a data set of 20 training and 10 test images, by name."""
    rng = np.random.default_rng(seed)
    files = {}
    for split, count in (("train", 20), ("test", 10)):
        image_file, label_file = idx.FILES[split]
        files[image_file] = idx_bytes(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[label_file] = idx_bytes(rng.integers(0, 10, count, dtype=np.uint8))
    return files


MNIST, KMNIST = small_set(0), small_set(1)
PACKED_KMNIST = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in KMNIST.items()}


def write(folder, files, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def images_of(files, split="test"):
    return torch.frombuffer(bytearray(files[idx.FILES[split][0]][16:]), dtype=torch.uint8).reshape(-1, 1, 28, 28) / 255


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Small stand-ins for mnist (checksums of the unpacked files) and kmnist (of the packed ones); an empty cache."""
    count = {"train": 20, "test": 10}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in (MNIST | PACKED_KMNIST).items()}
    nowhere = ("http://127.0.0.1:9/",)  # nothing listens there
    monkeypatch.setitem(idx.SOURCES, "mnist", idx.Source(nowhere, {name: sums[name] for name in MNIST}, count))
    monkeypatch.setitem(idx.SOURCES, "kmnist", idx.Source(nowhere, {name: sums[name] for name in PACKED_KMNIST}, count))
    monkeypatch.delenv("ABSYNTH_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "absynth"


@pytest.fixture
def server(tmp_path, cache, monkeypatch):
    """A mirror of both data sets; the folder it serves."""
    folder = write(tmp_path / "served", MNIST, packed=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        mirrors = ("http://127.0.0.1:9/", f"http://127.0.0.1:{httpd.server_port}/")  # the first one is down
        for name in ("mnist", "kmnist"):
            source = idx.SOURCES[name]
            monkeypatch.setitem(idx.SOURCES, name, idx.Source(mirrors, source.sha256, source.count))
        yield folder
        httpd.shutdown()
        thread.join()


def fails(message, *args, error=InputError, **kwargs):
    with pytest.raises(error, match=message) as caught:
        data.load(*args, **kwargs)
    assert "\n" not in str(caught.value)


# Files at hand


def test_mnist(mnist_train, mnist_test):
    for (images, labels), count in ((mnist_train, 60_000), (mnist_test, 10_000)):
        assert images.shape == (count, 1, 28, 28) and images.dtype == torch.float32
        assert images.min() == 0 and images.max() == 1
        assert labels.shape == (count,) and labels.dtype == torch.int64
    assert mnist_test[1][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert mnist_train[1].bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


@pytest.mark.parametrize("packed", [False, True])
def test_search_order_is_root_then_environment_then_cache(tmp_path, cache, monkeypatch, packed):
    folders = [tmp_path / "root", tmp_path / "root/mnist", tmp_path / "env", tmp_path / "env/mnist", cache / "mnist"]
    monkeypatch.setenv("ABSYNTH_DATA", str(tmp_path / "env"))
    for folder in reversed(folders):
        write(folder, MNIST, packed)
        images, labels = data.load("mnist", "test", root=tmp_path / "root")
        assert torch.equal(images, images_of(MNIST))
        assert labels.tolist() == list(MNIST[TEST_LABELS][8:])
        assert idx.find("mnist", TEST_IMAGES, tmp_path / "root")[0].parent == folder
    assert data.at_hand("mnist") and not data.at_hand("kmnist")


def test_files_of_another_data_set_with_the_same_names_are_passed_over(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("ABSYNTH_DATA", str(write(tmp_path / "env", MNIST, packed=True)))
    (tmp_path / "env/kmnist").mkdir()
    for name, content in PACKED_KMNIST.items():
        (tmp_path / "env/kmnist" / name).write_bytes(content)
    assert torch.equal(data.load("kmnist", "test")[0], images_of(KMNIST))
    assert torch.equal(data.load("mnist", "test")[0], images_of(MNIST))


def test_unpacked_files_without_a_published_checksum_are_checked_for_structure(tmp_path, cache):
    root = write(tmp_path / "root", KMNIST)
    assert torch.equal(data.load("kmnist", "train", root=root)[0], images_of(KMNIST, "train"))
    (root / TEST_LABELS).write_bytes(KMNIST[TEST_LABELS][:-1] + b"\x0b")
    fails("label 11, expected 0 to 9", "kmnist", "test", root=root)
    (root / TEST_IMAGES).write_bytes(KMNIST["train-images-idx3-ubyte"])
    fails(r"\(20, 28, 28\), expected \(10, 28, 28\)", "kmnist", "test", root=root)


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", [0, 3, 10, 1000])
def test_truncated_files(tmp_path, cache, name, packed, cut):
    root = write(tmp_path / "root", MNIST if name == "mnist" else KMNIST, packed)
    path = root / (f"{TEST_IMAGES}.gz" if packed else TEST_IMAGES)
    path.write_bytes(path.read_bytes()[:cut])
    fails(f"{path.name}.*delete", name, "test", root=root)


@pytest.mark.parametrize("packed", [False, True])
def test_tampered_files(tmp_path, cache, packed):
    changed = MNIST[TEST_IMAGES][:-1] + bytes([MNIST[TEST_IMAGES][-1] ^ 1])
    root = write(tmp_path / "root", MNIST | {TEST_IMAGES: changed}, packed)
    fails("not the published mnist file", "mnist", "test", root=root)


def test_a_tampered_packed_file_of_a_set_with_packed_checksums(tmp_path, cache):
    changed = KMNIST[TEST_IMAGES][:-1] + bytes([KMNIST[TEST_IMAGES][-1] ^ 1])
    root = write(tmp_path / "root", KMNIST | {TEST_IMAGES: changed}, packed=True)
    fails("not the published kmnist file", "kmnist", "test", root=root)


def test_unknown_names_and_splits():
    fails("unknown data set 'mnits': did you mean.*mnist", "mnits", "test")
    fails("unknown split 'tets': did you mean test", "mnist", "tets")
    fails("no folder at /no/such/folder", "/no/such/folder", "test")
    fails("no folder at", Path("mnits"), "test")
    fails("unknown data set None: known: digits", None, "test")
    fails(r"unknown data set \['mnist'\]: known: digits", ["mnist"], "test")
    fails("unknown split None: known: test, train", "mnist", None)
    fails(r"^unknown data set \[tensor\(.*: known: digits[^\n]*$", [torch.rand(9, 1, 8, 8), torch.zeros(9)], "test")


# Downloads


def test_download_stores_checked_files_and_uses_them_again(server, cache, capsys):
    images, _ = data.load("mnist", "test")
    assert torch.equal(images, images_of(MNIST))
    assert sorted(path.name for path in (cache / "mnist").iterdir()) == [f"{TEST_IMAGES}.gz", f"{TEST_LABELS}.gz"]
    captured = capsys.readouterr()
    assert captured.out == "" and TEST_IMAGES in captured.err  # the progress bar is on stderr
    for path in server.iterdir():
        path.unlink()
    assert torch.equal(data.load("mnist", "test")[0], images)


@pytest.mark.parametrize("damage", ["truncated", "tampered", "a web page"])
def test_a_bad_download_is_not_kept(server, cache, damage):
    path = server / f"{TEST_IMAGES}.gz"
    content = {
        "truncated": path.read_bytes()[:-100],
        "tampered": gzip.compress(MNIST[TEST_IMAGES][:-1] + b"\0"),
        "a web page": b"<html>log in first</html>",
    }[damage]
    path.write_bytes(content)
    fails("mnist is not at hand and could not be downloaded", "mnist", "test", error=data.DataUnavailable)
    assert list((cache / "mnist").iterdir()) == []
    path.write_bytes(gzip.compress(MNIST[TEST_IMAGES]))
    assert torch.equal(data.load("mnist", "test")[0], images_of(MNIST))


def test_another_data_sets_files_are_not_taken_from_a_mirror(server, cache):
    fails("could not be downloaded", "kmnist", "test", error=data.DataUnavailable)  # the server has mnist's files


def test_no_network(cache):
    fails("could not be downloaded.*refused.*ABSYNTH_DATA.*digits", "mnist", "test", error=data.DataUnavailable)
    assert not data.at_hand("mnist")
    assert data.at_hand("digits")


def test_a_cache_that_cannot_be_written(server, cache):
    cache.parent.write_text("a file where the cache folder should be")
    fails("cannot store mnist in .*: Not a directory.*ABSYNTH_DATA", "mnist", "test")


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="needs a folder where not even root may write")
def test_a_read_only_cache(server, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/sys")
    fails("cannot store mnist in /sys/absynth/mnist: .*make it writable", "mnist", "test")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_leaves_nothing_behind(server, cache):
    (cache / "mnist").mkdir(parents=True)
    (cache / "mnist" / f"{TEST_IMAGES}.gz.{os.getpid()}.part").symlink_to("/dev/full")
    fails("cannot store mnist in .*: No space left on device; free some space", "mnist", "test")
    assert list((cache / "mnist").iterdir()) == []


DOWNLOAD = """
import sys
from absynth import data, idx
source = idx.SOURCES["mnist"]
idx.SOURCES["mnist"] = idx.Source((sys.argv[1],), source.sha256, source.count)
data.load("mnist", "test")
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_is_stopped_leaves_no_half_file(server, cache, how):
    """Ctrl-C removes the temporary file; kill -9 cannot, but the next download does. Neither leaves the final name."""
    release = threading.Event()

    class Stalling(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(bytes(500_000))
            release.wait(60)

        def log_message(self, *args):
            pass

    folder = cache / "mnist"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling) as httpd:
        threading.Thread(target=httpd.serve_forever).start()
        url = f"http://127.0.0.1:{httpd.server_port}/"
        process = subprocess.Popen([sys.executable, "-c", DOWNLOAD, url], stderr=subprocess.PIPE)
        try:
            while not any(path.stat().st_size for path in folder.glob("*.part")):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.02)
            process.send_signal(how)
            process.communicate(timeout=60)
        finally:
            process.kill()
            release.set()
            httpd.shutdown()
    left = [path.suffix for path in folder.iterdir()]
    assert left == ([".part"] if how == signal.SIGKILL else [])
    assert torch.equal(data.load("mnist", "test")[0], images_of(MNIST))
    assert sorted(path.name for path in folder.iterdir()) == [f"{TEST_IMAGES}.gz", f"{TEST_LABELS}.gz"]


# The embedded digits


def test_digits_look_like_mnist():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert train[0].shape == (1297, 1, 28, 28) and test[0].shape == (500, 1, 28, 28)
    assert train[1].dtype == torch.int64 and test[1].bincount().min() >= 40
    images = torch.cat([train[0], test[0]])
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1
    grid = torch.arange(28.0)
    mass = images.sum(dim=(1, 2, 3))
    assert ((images.sum(dim=(1, 3)) @ grid) / mass - 14).abs().max() < 0.51  # rows
    assert ((images.sum(dim=(1, 2)) @ grid) / mass - 14).abs().max() < 0.51  # columns
    nearest = torch.cdist(test[0].flatten(1), train[0].flatten(1)).argmin(dim=1)
    assert (train[1][nearest] == test[1]).float().mean() > 0.94


# Folders of pictures


@pytest.fixture
def folder(tmp_path):
    """Classes 2 and 10 with ten framed pictures each; a picture's first pixel tells its class."""
    for name in ("10", "2"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(10):
            values = np.zeros((28, 28), np.uint8)
            values[14, index + 5] = 255
            values[5, 5] = int(name)
            Image.fromarray(values).save(tmp_path / "set" / name / f"{index}.png")
    (tmp_path / "set" / ".hidden").mkdir()
    return tmp_path / "set"


def test_a_folder_has_one_class_a_subfolder(folder):
    images, labels = data.load_folder(folder)
    assert images.shape == (20, 1, 28, 28)
    assert labels.tolist() == [0] * 10 + [1] * 10
    assert torch.equal(images[:, 0, 5, 5], torch.tensor([2.0] * 10 + [10.0] * 10) / 255)  # by number: 2 before 10
    assert data.class_names(folder) == ("2", "10")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / "2" / name).write_bytes(b"not a picture")
    assert len(data.load_folder(folder)[0]) == 20
    assert data.load_folder(folder, image_size=32)[0].shape == (20, 1, 32, 32)


def test_a_folder_is_a_data_set(folder):
    train, test = data.load(str(folder), "train"), data.load(folder, "test")
    assert train[1].bincount().tolist() == [8, 8] and test[1].bincount().tolist() == [2, 2]
    assert sorted(map(data.digest, torch.cat([train[0], test[0]]))) == sorted(
        map(data.digest, data.load_folder(folder)[0])
    )
    assert torch.equal(data.load(folder, "test")[0], test[0])
    assert data.at_hand(str(folder))


def test_a_folder_may_bring_its_own_split(folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / "both" / split).symlink_to(folder)
    assert len(data.load(tmp_path / "both", "test")[1]) == 20
    assert data.class_names(tmp_path / "both") == ("2", "10")
    (tmp_path / "both/test").unlink()
    for name in ("2", "11"):
        (tmp_path / "both/test" / name).mkdir(parents=True)
    fails("must be the same", tmp_path / "both", "test")


def test_bad_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    fails("at least 2 classes, has none", tmp_path / "empty", "test")
    (tmp_path / "empty/one").mkdir()
    fails("at least 2 classes, has only one", tmp_path / "empty", "test")
    (tmp_path / "empty/two").mkdir()
    fails("class folder .*one has no pictures", tmp_path / "empty", "test")
    with pytest.raises(InputError, match="no folder at"):
        data.load_folder(tmp_path / "missing")
    for path in list((folder / "10").iterdir())[1:]:
        path.unlink()
    fails("10 has one picture", folder, "test")
    (folder / "2" / "notes.txt").write_text("seven")
    fails(r"notes.txt is not a picture.* remove this file or convert it", folder, "test")


# Holding out, digests, names


def test_holdout_is_balanced_complete_and_repeatable():
    labels = torch.tensor([0, 1, 2] * 50 + [0] * 100)
    images = torch.arange(250.0).reshape(250, 1, 1, 1)
    (rest, rest_labels), (held, held_labels) = data.holdout(images, labels, 20, seed=1)
    assert held_labels.bincount().tolist() == [7, 7, 6]
    assert torch.equal(torch.cat([rest, held]).flatten().sort().values, images.flatten())
    assert torch.equal(labels[held.flatten().long()], held_labels)
    assert torch.equal(labels[rest.flatten().long()], rest_labels)
    assert torch.equal(held.flatten().sort().values, held.flatten())
    before = torch.get_rng_state()
    again = data.holdout(images, labels, 20, seed=1)
    assert torch.equal(again[1][0], held) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(data.holdout(images, labels, 20, seed=2)[1][0], held)


@pytest.mark.parametrize("size", [0, -1, 150, 1000])
def test_holdout_sizes_that_do_not_fit(size):
    with pytest.raises(InputError, match=r"held-out size|cannot hold out"):
        data.holdout(torch.zeros(150, 1, 1, 1), torch.tensor([0, 1, 2] * 50), size)


def test_digest_tells_values_types_shapes_and_order_apart():
    one, two = torch.zeros(2, 3), torch.ones(2, 3)
    variants = [(one, two), (two, one), (one,), (one.double(), two), (one.reshape(3, 2), two), (one, two + 1e-7)]
    assert len({data.digest(*tensors) for tensors in variants}) == len(variants)
    assert data.digest(torch.ones(3, 2).T, two) == data.digest(two, two)


def test_every_named_set_has_ten_class_names():
    for name in data.NAMES:
        assert len(set(data.class_names(name))) == 10
