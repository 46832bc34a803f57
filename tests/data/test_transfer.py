"""A transfer set: images of another data set, without their labels, in the place of train."""

import pytest
import torch
from PIL import Image

from gracile.data.sets import open_data
from gracile.errors import BindError, UserError
from gracile.recipe.load import loads
from gracile.train.bind import check_transfer

GOOD = "recipe: 1\ndata: {transfer: x}\ntrain: {epochs: 1}\nmethods:\n  kd: {distill: kd, alpha: 0}"


def pictures(folder, count, size=(32, 32)):
    (folder / "train" / "any").mkdir(parents=True)
    for k in range(count):
        Image.new("RGB", size, (k, 0, 0)).save(folder / "train" / "any" / f"{k:02}.png")
    return f"imagefolder:{folder}"


def test_its_images_come_without_labels_and_are_part_of_the_identity(tmp_path):
    spec = pictures(tmp_path, 7)
    bundle = open_data("digits", recipe_data={"transfer": spec})
    plain = open_data("digits")
    assert len(bundle.transfer) == 7
    assert bundle.transfer.labels.tolist() == [0] * 7
    assert bundle.transfer.images([3, 5])[:, 0, 0, 0].tolist() == [3, 5]
    assert bundle.classes == 10
    assert torch.equal(bundle.val.labels, plain.val.labels)
    assert bundle.sha != plain.sha
    assert "7 images without labels" in bundle.notes["transfer"]
    assert plain.transfer is None


def test_pictures_of_another_size_and_the_run_s_own_data_are_refused(tmp_path):
    spec = pictures(tmp_path, 2, (8, 8))
    with pytest.raises(
        UserError, match=r"data.transfer: images of .* are \(3, 8, 8\), of the data"
    ):
        open_data("digits", recipe_data={"transfer": spec})
    with pytest.raises(UserError, match=r"data.transfer: 'digits' is the data set of the run"):
        open_data("digits", recipe_data={"transfer": "digits"})


def test_a_teacher_has_to_answer_everything():
    check_transfer(loads(GOOD, name="r.yaml"))
    for change, text in (
        (("alpha: 0", "alpha: 0.1"), r"r.yaml:2: data.transfer: .* write {distill: kd, alpha: 0}"),
        (("alpha: 0", "alpha: 0, when: {start: 0.5ep}"), "all through training"),
        (("alpha: 0", "alpha: 0, loss: dkd"), "loss 'dkd' needs labels. Take loss: soft"),
        (("distill: kd, alpha: 0", "quantize: qat, when: {start: 0ep}"), "a teacher has to answer"),
        (("epochs: 1", "epochs: 0"), "nothing is trained"),
    ):
        with pytest.raises(BindError, match=text):
            check_transfer(loads(GOOD.replace(*change), name="r.yaml"))
