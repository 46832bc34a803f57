"""Every way to name data: what comes out, what identifies it, and what a mistake says."""

import io
import json
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet as pq

from gracile import registry
from gracile.data.loader import Loader
from gracile.data.sets import list_data, open_data
from gracile.errors import MissingExtra, UserError


def image_bytes(k, size=(5, 4), kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, k if mode == "L" else (k, 0, 255 - k)).save(buffer, kind)
    return buffer.getvalue()


def write(file, count, *, column="img", label="label", plain=False, names=None, **options):
    data = [image_bytes(k, **options) for k in range(count)]
    images = data if plain else [{"bytes": d, "path": "x.png"} for d in data]
    table = pa.table({column: images, label: [k % 3 for k in range(count)]})
    if names:
        info = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, file)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.parquet", 20)
    write(tmp_path / "test.parquet", 6)
    return tmp_path


def test_parquet_end_to_end(folder):
    bundle = open_data(f"parquet:{folder}", recipe_data={"val": 5, "calibration": 4}, seed=1)
    assert (bundle.name, bundle.classes, bundle.class_names) == ("parquet", 3, ("0", "1", "2"))
    assert bundle.shape == (3, 4, 5)
    assert [len(s) for s in (bundle.train, bundle.val, bundle.test)] == [15, 5, 6]
    assert bundle.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert bundle.test.images([4])[0, :, 0, 0].tolist() == [4, 0, 251]
    assert set(bundle.notes) == {"train", "val", "test", "calibration"}
    assert bundle.mean == (0.485, 0.456, 0.406)
    assert bundle.augmentation == "standard"


def test_parquet_other_columns_names_and_gray(tmp_path):
    write(
        tmp_path / "test.parquet", 3, column="photo", label="kind", plain=True, mode="L",
        names=["cat", "dog", "owl"], kind="JPEG",
    )  # fmt: skip
    bundle = open_data(f"parquet:{tmp_path}?image=photo&label=kind")
    assert bundle.class_names == ("cat", "dog", "owl")
    assert bundle.shape == (1, 4, 5)
    assert (bundle.mean, bundle.std) == ((0.449,), (0.226,))
    rgb = open_data(f"parquet:{tmp_path}?image=photo&label=kind&channels=3&size=2")
    assert rgb.shape == (3, 2, 2)


def test_sha_sees_content_rows_and_options_but_not_normalization(folder):
    spec = f"parquet:{folder}"
    sha = open_data(spec).sha
    assert sha == open_data(spec, recipe_data={"mean": [0, 0, 0], "std": 1}).sha
    others = {
        open_data(spec, seed=1).sha,
        open_data(spec, recipe_data={"val": 3}).sha,
        open_data(spec + "?size=2").sha,
    }
    write(folder / "train.parquet", 20, kind="JPEG")
    others.add(open_data(spec).sha)
    assert len(others) == 4
    assert sha not in others


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mean": [0.5]}, r"data.mean must be 3 numbers, one a channel: \[0.5\]"),
        ({"std": 0}, "data.std must be 3 positive numbers"),
        ({"std": "half"}, "data.std must be 3 positive numbers"),
    ],
)
def test_normalization_is_checked(folder, data, message):
    with pytest.raises(UserError, match=message):
        open_data(f"parquet:{folder}", recipe_data=data)
    assert open_data(f"parquet:{folder}", recipe_data={"mean": 0.5}).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parqet:x", "unknown dataset 'parqet'. Nearest: 'parquet'"),
        ("parquet:/nowhere", "'parquet:/nowhere': no such folder"),
        ("parquet", "no such folder"),
        ("digits:here", "digits takes no location"),
        ("cifar10:here", "for files of your own write parquet:DIR"),
        ("digits?size=3", "dataset 'digits' has no option 'size'"),
        ("digits?size", r"options are written \?key=value"),
        ("imagefolder:/nowhere", "no such folder"),
    ],
)
def test_wrong_specifications(spec, message):
    with pytest.raises(UserError, match=message):
        open_data(spec)


def test_wrong_parquet_files(tmp_path):
    spec = f"parquet:{tmp_path}"
    with pytest.raises(UserError, match=r"none of train\.parquet, val\.parquet, test\.parquet"):
        open_data(spec)
    write(tmp_path / "test.parquet", 3, column="photo")
    with pytest.raises(UserError, match=r"no column 'img' or 'image' .* it has photo, label"):
        open_data(spec)
    write(tmp_path / "test.parquet", 3, label="kind")
    with pytest.raises(UserError, match=r"no column 'label' .* Add \?label=COLUMN"):
        open_data(spec)
    pq.write_table(pa.table({"img": [b"x"], "label": ["cat"]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match="column 'label': labels must be integers >= 0"):
        open_data(spec)
    pq.write_table(pa.table({"img": [None], "label": [0]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match="row 0 of column 'img' holds no image bytes"):
        open_data(spec)
    write(tmp_path / "test.parquet", 6, names=["cat", "dog"])
    with pytest.raises(UserError, match="label 2 has no name: 2 classes are named"):
        open_data(spec)
    (tmp_path / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a parquet file"):
        open_data(spec)


def test_splits_of_different_shape_are_refused(folder):
    write(folder / "test.parquet", 3, size=(8, 8))
    with pytest.raises(UserError, match=r"of train are \(3, 4, 5\), of test \(3, 8, 8\)"):
        open_data(f"parquet:{folder}")


def test_missing_packages_name_their_extra(folder, monkeypatch):
    for package in ("pyarrow", "sklearn.datasets", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    for spec, extra in ((f"parquet:{folder}", "parquet"), ("digits", "digits"), ("cifar10", "hf")):
        with pytest.raises(MissingExtra, match=rf"pip install 'gracile\[{extra}\]'"):
            open_data(spec)


def test_digits_have_one_fixed_stratified_test_split():
    first, second = open_data("digits", seed=0), open_data("digits", seed=1)
    assert len(first.train) + len(first.val) + len(first.test) == 1797
    assert len(first.test) == 360
    assert torch.equal(first.test.labels, second.test.labels)
    assert not torch.equal(first.val.rows, second.val.rows)
    counts = first.test.labels.bincount()
    assert (int(counts.min()), int(counts.max())) == (35, 37)
    assert first.shape == (3, 32, 32)
    assert first.classes == 10
    assert first.augmentation == "shift"


def test_digits_are_scaled_from_0_16_to_0_255_and_gray():
    x = open_data("digits").test.images(range(360))
    assert (int(x.min()), int(x.max())) == (0, 255)
    assert torch.equal(x[:, 0], x[:, 1])
    assert torch.equal(x[:, 0], x[:, 2])


def test_digits_keep_their_means():
    """Scaling up four times keeps every 4x4 block's centre: compare with the original pixels."""
    from sklearn.datasets import load_digits

    bundle = open_data("digits", recipe_data={"val": "train[:1]"})
    small = torch.from_numpy(load_digits().images).float().mean() / 16
    large = torch.cat([bundle.train.images(range(1436)), bundle.test.images(range(360))]).float()
    assert float(large.mean()) / 255 == pytest.approx(float(small), abs=0.01)


def save_classes(folder, per_class, size=(6, 5)):
    for name, colour in (("ape", 10), ("bee", 200)):
        (folder / name).mkdir(parents=True)
        for k in range(per_class):
            Image.new("RGB", size, (colour, k, 0)).save(folder / name / f"{k}.png")
    (folder / "ape" / "notes.txt").write_text("no image")


def test_imagefolder_end_to_end(tmp_path):
    save_classes(tmp_path / "train", 5)
    save_classes(tmp_path / "val", 2, size=(8, 4))
    bundle = open_data(f"imagefolder:{tmp_path}?size=4", recipe_data={"val": 2})
    assert (bundle.class_names, bundle.shape) == (("ape", "bee"), (3, 4, 4))
    assert [len(s) for s in (bundle.train, bundle.val, bundle.test)] == [8, 2, 4]
    assert bundle.notes["test"] == "val rows 0-3 (all)"
    assert bundle.test.images([3, 0])[:, 0, 0, 0].tolist() == [200, 10]
    assert bundle.test.labels.tolist() == [0, 0, 1, 1]
    (x, y), *_ = Loader(bundle.train, 8, mean=bundle.mean, std=bundle.std, shuffle=True)
    assert x.shape == (8, 3, 4, 4)
    assert y.bincount().tolist() == [4, 4]


def test_imagefolder_identity_is_names_and_sizes(tmp_path):
    save_classes(tmp_path / "test", 2)
    spec = f"imagefolder:{tmp_path}"
    sha = open_data(spec).sha
    assert sha == open_data(spec).sha
    (tmp_path / "test" / "bee" / "1.png").rename(tmp_path / "test" / "bee" / "9.png")
    assert sha != open_data(spec).sha


def test_imagefolder_mistakes(tmp_path):
    spec = f"imagefolder:{tmp_path}"
    with pytest.raises(UserError, match=r"no images; expected .*/train/CLASS/\*\.png"):
        open_data(spec)
    save_classes(tmp_path / "train", 2)
    save_classes(tmp_path / "test", 2)
    (tmp_path / "test" / "bee").rename(tmp_path / "test" / "cow")
    with pytest.raises(UserError, match=r"class 'cow' is not in .*train"):
        open_data(spec)


def saved_cifar(folder):
    import datasets

    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["car", "cat"])}
    )
    rng = np.random.default_rng(0)

    def part(n):
        images = [
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)
        ]
        return datasets.Dataset.from_dict(
            {"img": images, "label": [k % 2 for k in range(n)]}, features=features
        )

    datasets.DatasetDict(train=part(20), test=part(8)).save_to_disk(folder)
    return datasets.load_from_disk(folder)


def test_cifar10_through_datasets(tmp_path, monkeypatch):
    import datasets

    saved = saved_cifar(tmp_path)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or saved)
    bundle = open_data("cifar10", recipe_data={"val": 4})
    assert asked == ["uoft-cs/cifar10"]
    assert (bundle.class_names, bundle.shape) == (("car", "cat"), (3, 32, 32))
    assert [len(s) for s in (bundle.train, bundle.val, bundle.test)] == [16, 4, 8]
    expected = np.asarray(saved["test"][5]["img"]).transpose(2, 0, 1)
    assert np.array_equal(bundle.test.images([5])[0].numpy(), expected)
    assert bundle.sha == open_data("cifar10", recipe_data={"val": 4}).sha


def test_cifar10_without_network_offers_parquet(monkeypatch):
    import datasets

    def offline(name):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        UserError, match=r"\(ConnectionError: Couldn't reach the Hub\); .* parquet:DIR"
    ):
        open_data("cifar10")


def test_a_new_source_is_one_registration(monkeypatch):
    entries = dict(registry._entries)
    monkeypatch.setattr(registry, "_entries", entries)
    digits = registry.get("dataset", "digits").obj

    @registry.register("dataset", "more_digits", source="this test")
    def more_digits(location: str, *, level: int = 1):
        return digits("")

    assert len(open_data("more_digits:anywhere?level=2").test) == 360
    assert "more_digits" in [e.name for e in list_data()]
    with pytest.raises(UserError, match="'level' must be a whole number, got 'high'"):
        open_data("more_digits?level=high")


def test_mnist_is_gray(data_dir):
    bundle = open_data(f"parquet:{data_dir / 'mnist'}")
    assert (bundle.shape, bundle.classes, len(bundle.test)) == ((1, 28, 28), 10, 3000)


@pytest.mark.slow
def test_fifty_thousand_jpegs_are_decoded_in_seconds(data_dir):
    bundle = open_data(f"parquet:{data_dir / 'cifar10-jpeg'}", recipe_data={"val": "test[5000:]",
                       "test": "test[:5000]", "calibration": "test[5000:5300]"})  # fmt: skip
    assert bundle.notes["val"] == "test rows 5000-9999"
    began = time.process_time()
    assert bundle.train.images(range(50_000)).shape == (50_000, 3, 32, 32)
    assert time.process_time() - began < 40  # about 9 s on a quiet core
