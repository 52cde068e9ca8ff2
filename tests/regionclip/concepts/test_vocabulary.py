"""Names and their text embeddings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clip_base.evaluation.prompts import fill
from clip_base.runtime.errors import InputError
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.data.categories import parse_names


class BagOfLetters(nn.Module):
    """A text encoder that can be checked by hand; counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(256, 8, generator=generator))
        self.batches: list[int] = []

    def encode_text(self, tokens: Tensor) -> Tensor:
        assert not self.training
        self.batches.append(len(tokens))
        return self.table[tokens].sum(1)


def letters(texts: list[str], truncate: bool = False) -> Tensor:
    assert truncate
    rows = [list(text.encode()[:40]) for text in texts]
    return torch.tensor([row + [0] * (40 - len(row)) for row in rows])


@pytest.fixture
def vocabulary() -> Vocabulary:
    return embed(
        BagOfLetters(), letters, ["cat", "dog", "fire hydrant"], novel=torch.tensor([False, True, False])
    )


def test_an_embedding_is_the_normalized_mean_over_templates():
    model, templates = BagOfLetters(), ("{}", "a photo of {article} {}.")
    found = embed(model, letters, ["ox"], templates)
    encoded = model.eval().encode_text(letters(["ox", "a photo of an ox."], truncate=True))
    expected = nn.functional.normalize(nn.functional.normalize(encoded, dim=1).mean(0), dim=0)
    torch.testing.assert_close(found.embeddings[0], expected.detach())
    assert found.embeddings.dtype == torch.float32
    assert not found.embeddings.requires_grad


def test_batches_do_not_change_embeddings_and_stay_in_size():
    names = [f"name {index}" for index in range(23)]
    whole = embed(BagOfLetters(), letters, names, ("{}", "x {}"))
    model = BagOfLetters()
    parts = embed(model, letters, names, ("{}", "x {}"), batch_size=7)
    torch.testing.assert_close(whole.embeddings, parts.embeddings)
    assert max(model.batches) == 6  # three names of two templates
    assert model.training


def test_ten_thousand_names_and_one_are_embedded_alike():
    names = [f"thing {index}" for index in range(10_000)]
    many = embed(BagOfLetters(), letters, names)
    assert many.embeddings.shape == (10_000, 8)
    one = embed(BagOfLetters(), letters, names[-1:])
    torch.testing.assert_close(many.embeddings[-1:], one.embeddings)


def test_few_embeddings_are_held_at_once_however_many_names_and_templates(monkeypatch: pytest.MonkeyPatch):
    held: WeakSet[Tensor] = WeakSet()
    most = 0
    normalize = nn.functional.normalize

    def watched(embeddings: Tensor, dim: int) -> Tensor:
        nonlocal most
        found = normalize(embeddings, dim=dim)
        held.add(found)
        most = max(most, sum(map(len, held)))
        return found

    monkeypatch.setattr(nn.functional, "normalize", watched)
    templates = [f"{number} {{}}" for number in range(10)]
    few = embed(BagOfLetters(), letters, [f"thing {index}" for index in range(200)], templates, batch_size=16)
    assert most <= 3 * 16  # and not 2000
    monkeypatch.undo()
    whole = embed(BagOfLetters(), letters, few.names, templates, batch_size=10_000)
    torch.testing.assert_close(few.embeddings, whole.embeddings)


def test_the_cache_serves_the_same_weights_templates_and_names_only(tmp_path: Path):
    model = BagOfLetters()
    first = embed(model, letters, ["cat", "dog"], cache=tmp_path)
    calls = len(model.batches)
    again = embed(model, letters, ["cat", "dog"], cache=tmp_path, novel=torch.tensor([True, False]))
    assert len(model.batches) == calls
    assert torch.equal(first.embeddings, again.embeddings)
    assert again.novel is not None
    assert again.novel.tolist() == [True, False]
    embed(model, letters, ["dog", "cat"], cache=tmp_path)
    embed(model, letters, ["cat", "dog"], ("{}",), cache=tmp_path)
    with torch.no_grad():
        model.table += 1
    embed(model, letters, ["cat", "dog"], cache=tmp_path)
    assert len(model.batches) == calls + 3
    assert len(list(tmp_path.iterdir())) == 4


def test_what_is_saved_is_loaded(vocabulary: Vocabulary, tmp_path: Path):
    vocabulary.save(tmp_path / "v.safetensors")
    loaded = Vocabulary.load(tmp_path / "v.safetensors")
    assert loaded.names == vocabulary.names
    assert loaded.provenance == vocabulary.provenance
    assert loaded.fingerprint == vocabulary.fingerprint
    assert loaded.novel is not None
    assert loaded.novel.tolist() == [False, True, False]
    assert Vocabulary.load(tmp_path / "v.safetensors", ["dog"]).names == ("dog",)


def test_the_fingerprint_knows_names_order_and_numbers(vocabulary: Vocabulary):
    swapped = vocabulary.subset(["dog", "cat", "fire hydrant"])
    other = Vocabulary(vocabulary.names, vocabulary.embeddings.roll(1, 0), vocabulary.novel)
    prints = {vocabulary.fingerprint, swapped.fingerprint, other.fingerprint}
    assert len(prints) == 3
    assert vocabulary.subset(vocabulary.names).fingerprint == vocabulary.fingerprint


def test_a_subset_keeps_rows_and_split(vocabulary: Vocabulary):
    part = vocabulary.subset(["fire hydrant", "dog"])
    assert torch.equal(part.embeddings, vocabulary.embeddings[[2, 1]])
    assert part.novel is not None
    assert part.novel.tolist() == [False, True]
    assert part.index("dog") == 1
    with pytest.raises(InputError, match=r"did you mean 'fire hydrant'\?"):
        vocabulary.subset(["fire hydrants"])
    with pytest.raises(InputError, match="'zebra' is not in the vocabulary"):
        vocabulary.index("zebra")


@pytest.mark.parametrize("transposed", [False, True])
def test_regionclips_and_detics_files_are_read_in_either_orientation(tmp_path: Path, transposed: bool):
    rows = torch.randn(3, 5)
    matrix = rows.T.contiguous() if transposed else rows
    torch.save(matrix, tmp_path / "a.pth")
    np.save(tmp_path / "a.npy", matrix.half().numpy())
    expected = nn.functional.normalize(rows, dim=1)
    for file in ("a.pth", "a.npy"):
        found = Vocabulary.load(tmp_path / file, ["x", "y", "z"])
        torch.testing.assert_close(found.embeddings, expected, atol=2e-3, rtol=0)
        assert found.provenance["source"] == file


def test_files_that_do_not_fit_are_input_errors(tmp_path: Path, vocabulary: Vocabulary):
    np.save(tmp_path / "a.npy", np.zeros((3, 5), np.float16))
    with pytest.raises(InputError, match="holds no names"):
        Vocabulary.load(tmp_path / "a.npy")
    with pytest.raises(InputError, match=r"\[3, 5\], which does not match 4 names"):
        Vocabulary.load(tmp_path / "a.npy", list("wxyz"))
    with pytest.raises(InputError, match="'x' an embedding of zeros"):
        Vocabulary.load(tmp_path / "a.npy", list("xyz"))
    with pytest.raises(InputError, match="does not exist"):
        Vocabulary.load(tmp_path / "none.npy", ["x"])
    vocabulary.save(tmp_path / "v.safetensors")
    whole = (tmp_path / "v.safetensors").read_bytes()
    (tmp_path / "v.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        Vocabulary.load(tmp_path / "v.safetensors")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(InputError, match="not a pickled tensor"):
        Vocabulary.load(tmp_path / "cut.pth", ["x"])
    torch.save({"a": torch.ones(1)}, tmp_path / "dict.pth")
    with pytest.raises(InputError, match="one float tensor, found dict"):
        Vocabulary.load(tmp_path / "dict.pth", ["x"])


def test_a_vocabulary_of_another_width_is_refused(vocabulary: Vocabulary):
    vocabulary.require_width(8, "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors.* width 8, the model 1024"):
        vocabulary.require_width(1024, "model.safetensors")


def test_repeated_and_missing_names_are_input_errors():
    with pytest.raises(InputError, match="'cat' occurs more than once"):
        embed(BagOfLetters(), letters, ["cat", "dog", "cat"])
    with pytest.raises(InputError, match="at least one name"):
        embed(BagOfLetters(), letters, [])
    with pytest.raises(InputError, match=r"needs \{\} where the name goes, found 'a photo'"):
        embed(BagOfLetters(), letters, ["cat"], ["a photo"])


def test_prompts_read_names_as_words():
    assert fill("{article} {}", "orange_juice") == "an orange juice"
    assert fill("a photo of {}.", "a{b}") == "a photo of a{b}."


def test_names_are_typed_listed_or_known(tmp_path: Path):
    assert parse_names(" cat, fire hydrant ,dog,") == ["cat", "fire hydrant", "dog"]
    assert parse_names("cat") == ["cat"]
    (tmp_path / "names.txt").write_text("# mine\ncat, kitty\ndog\n")
    assert parse_names(str(tmp_path / "names.txt")) == ["cat", "dog"]
    (tmp_path / "names.json").write_text(
        json.dumps({"categories": [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}]})
    )
    assert parse_names(str(tmp_path / "names.json")) == ["a", "b"]
    with pytest.raises(InputError, match="does not exist"):
        parse_names("nowhere/names.txt")
    with pytest.raises(InputError, match="does not exist"):
        parse_names("names_of_mine.txt")
    with pytest.raises(InputError, match="'cat' occurs more than once"):
        parse_names("cat, cat")


def test_cocos_lists_are_the_published_ones():
    everything, base, novel = parse_names("coco"), parse_names("coco_base"), parse_names("coco_novel")
    assert (len(everything), len(base), len(novel)) == (80, 48, 17)
    assert parse_names("coco65") == base + novel
    assert not set(base) & set(novel)
    assert set(base) | set(novel) <= set(everything)
    assert everything[:3] == ["person", "bicycle", "car"]
    digest = hashlib.sha256(",".join(everything).encode()).hexdigest()
    assert digest.startswith("926f2316e64cf896")


def test_real_neighbors_of_a_cat_make_sense(shared_data: Path):
    folder = shared_data / "text_embeddings"
    coco = Vocabulary.load(folder / "clip_rn50_coco80.npy", parse_names("coco"))
    assert neighbors(coco, "cat")[0] == "dog"
    lvis = Vocabulary.load(
        folder / "clip_rn50_lvis1203.npy",
        parse_names(str(shared_data / "metadata" / "lvis_v1_train_cat_info.json")),
    )
    assert lvis.embeddings.shape == (1203, 1024)
    assert {"kitten", "dog"} & set(neighbors(lvis, "cat")[:5])


def test_a_real_file_in_three_forms_is_the_same_vocabulary(shared_data: Path, tmp_path: Path):
    detic = shared_data / "text_embeddings" / "clip_rn50_coco80.npy"
    first = Vocabulary.load(detic, parse_names("coco"))
    torch.save(torch.from_numpy(np.load(detic)), tmp_path / "regionclip.pth")
    first.save(tmp_path / "ours.safetensors")
    for again in (
        Vocabulary.load(tmp_path / "regionclip.pth", parse_names("coco")),
        Vocabulary.load(tmp_path / "ours.safetensors"),
    ):
        assert again.fingerprint == first.fingerprint


def neighbors(vocabulary: Vocabulary, name: str) -> list[str]:
    similarity = vocabulary.embeddings @ vocabulary.embeddings[vocabulary.index(name)]
    return [vocabulary.names[index] for index in similarity.argsort(descending=True)[1:]]
