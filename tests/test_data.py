import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from spotlight_jax import documents, texts
from spotlight_jax.config.data import DataConfig
from spotlight_jax.data import open_windows
from spotlight_jax.encoding import Encoder, split_document
from spotlight_jax.errors import InputError


def _byte_tokenizer(backwards: bool = False) -> tokenizers.Tokenizer:
    """One token a byte; GPT-2's way of cutting text into words first."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), reverse=backwards)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


TOKENIZER = _byte_tokenizer()


class _WithEos:
    """Like a fast tokenizer of `transformers`, with an end-of-text id past the bytes."""

    backend_tokenizer = TOKENIZER
    eos_token_id = 256

    def __len__(self):
        return 257


@pytest.fixture(autouse=True)
def _no_writes_to_the_users_cache(own_cache):
    """Every test here tokenises into a folder of its own."""


def _ids(folder: Path, count: int, name: str = "ids.npy", start: int = 0) -> str:
    """A file of the token ids start, start + 1, ...: each window then tells where it came from."""
    path = folder / name
    np.save(path, np.arange(start, start + count, dtype=np.uint32))
    return str(path)


def _open(train, window=8, held_out_windows=2, vocab_size=1 << 20, tokenizer=TOKENIZER, **options):
    cfg = DataConfig(tuple(train), window=window, held_out_windows=held_out_windows, **options)
    return open_windows(cfg, tokenizer, vocab_size)


def _take(windows, count: int) -> list[list[int]]:
    return [windows.next().tolist() for _ in range(count)]


# What a window holds


def test_windows_are_int32_of_the_length_asked_for(tmp_path):
    windows = _open([_ids(tmp_path, 100)], window=9, held_out_windows=3)
    assert windows.held_out.shape == (3, 9) and windows.held_out.dtype == np.int32
    assert windows.next().shape == (9,) and windows.next().dtype == np.int32


def test_documents_are_joined_with_the_end_of_text_id(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("de")
    windows = _open([str(tmp_path)], window=7, held_out_windows=0, tokenizer=_WithEos(), vocab_size=None)
    letters = {char: TOKENIZER.token_to_id(char) for char in "abcde"}
    assert _take(windows, 1) == [[*(letters[char] for char in "abc"), 256, letters["d"], letters["e"], 256]]


def test_all_file_kinds_give_the_same_windows(tmp_path, own_cache):
    words = ["the first document\n", "und noch eins, mit Ümläuten\n"]
    (tmp_path / "txt").mkdir()
    for index, text in enumerate(words):
        (tmp_path / "txt" / f"{index}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in words))
    pq.write_table(pa.table({"id": [1, 2], "text": words}), tmp_path / "x.parquet")
    ids = [TOKENIZER.encode(text).ids for text in words]
    np.save(tmp_path / "x.npy", np.concatenate(ids).astype(np.int64))
    results = []
    for name in ("txt", "txt/*.txt", "x.jsonl", "x.parquet", "x.npy"):
        results.append(_take(_open([str(tmp_path / name)], window=11, held_out_windows=1), 6))
    assert sorted(map(len, results)) == [6] * 5
    rows = [sorted(map(tuple, result)) for result in results]
    assert all(row == rows[0] for row in rows)


def test_a_folder_is_searched_through_and_other_files_are_left(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b.txt").write_text("bbbb")
    (tmp_path / "a.md").write_text("aaaa")
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.txt").write_text("cccc")
    window = _open([str(tmp_path)], window=8, held_out_windows=0).next()
    assert TOKENIZER.decode(window.tolist()) == "aaaabbbb"


def test_tokens_are_made_once_per_text_and_tokenizer(tmp_path, own_cache):
    book = tmp_path / "book.txt"
    book.write_text("one two three four")
    for _ in range(2):
        first = _take(_open([str(book)], held_out_windows=0, vocab_size=None), 2)
        assert len(list(own_cache.rglob("*.npy"))) == 1
    _open([str(book)], held_out_windows=0, vocab_size=None, tokenizer=_WithEos())
    assert len(list(own_cache.rglob("*.npy"))) == 2
    windows = _open([str(book)], held_out_windows=0, vocab_size=None, tokenizer=_byte_tokenizer(backwards=True))
    assert sorted(_take(windows, 2)) == sorted([255 - token for token in row] for row in first)
    book.write_text("one two three five")
    _open([str(book)], held_out_windows=0, vocab_size=None)
    assert len(list(own_cache.rglob("*.npy"))) == 4
    assert {path.suffix for path in own_cache.rglob("*") if path.is_file()} == {".npy"}
    assert all(np.load(path).dtype == np.uint16 for path in own_cache.rglob("*.npy"))


def test_tokenising_that_breaks_leaves_nothing_half_written(tmp_path, own_cache):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' * 9 + "broken\n")
    with pytest.raises(InputError):
        _open([str(tmp_path / "x.jsonl")])
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


def test_the_same_bytes_under_another_suffix_are_another_text(tmp_path):
    line = '{"text": "abcdefgh"}\n'
    (tmp_path / "x.txt").write_text(line)
    (tmp_path / "x.jsonl").write_text(line)
    raw, parsed = (_open([str(tmp_path / name)], held_out_windows=0).next() for name in ("x.txt", "x.jsonl"))
    assert TOKENIZER.decode(raw.tolist()) in line and TOKENIZER.decode(parsed.tolist()) == "abcdefgh"


def test_rows_whose_text_is_null_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"text": None}, {"text": "abcd"}, {"text": None}, {"text": "efgh"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        assert TOKENIZER.decode(_take(_open([str(tmp_path / name)], held_out_windows=0), 1)[0]) == "abcdefgh"
        assert caplog.messages.pop() == f"'{tmp_path / name}': 2 rows are left out, because 'text' is null"
        caplog.clear()


@given(st.text(alphabet="ab \n.é7", max_size=400), st.integers(1, 40))
def test_pieces_join_to_the_document(text, size):
    pieces = split_document(text, size)
    assert "".join(pieces) == text
    assert all(len(piece) >= size for piece in pieces[:-1])
    for piece in pieces:  # a longer one holds no place for a cut
        assert len(piece) <= 2 * size or not re.search(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)", piece[2 * size :])


@given(st.text(alphabet="ab \n.é7", max_size=400), st.integers(1, 40))
def test_a_document_is_left_whole_where_no_cut_is_safe(text, size):
    assert split_document(text, size, is_seam=lambda before, after: False) == [text]


@pytest.mark.parametrize("indent", ["", "    "])  # with it, no line of a long function starts at the margin
def test_a_document_in_pieces_has_the_tokens_it_has_whole(indent):
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=800, show_progress=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = "".join(texts.read_text("python-source")[:12]).splitlines(keepends=True)
    source = "".join(indent + line for line in lines)
    tokenizer.train_from_iterator([source], trainer)
    assert len(split_document(source)) > 2
    assert Encoder(tokenizer).encode([source])[0].tolist() == tokenizer.encode(source).ids


def _sentence_pieces(prepend: str, alone: bool) -> tokenizers.Tokenizer:
    """As LLaMA 2 (`alone` False: one merge table over whole texts) and T5 (word by word) cut: U+2581 begins a word."""
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, show_progress=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.train_from_iterator(texts.read_text("python-source")[:2], trainer)
    if not alone:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
    return tokenizer


@pytest.mark.parametrize(("prepend", "alone"), [("always", True), ("first", True), ("never", True), ("always", False)])
def test_a_sentencepiece_document_has_no_false_word_start_at_a_seam(prepend, alone):
    tokenizer = _sentence_pieces(prepend, alone)
    source = "".join(texts.read_text("python-source")[:16])
    encoder = Encoder(tokenizer)
    assert len(split_document(source)) > 2
    if alone:  # words are tokenised one by one: there are safe places before spaces
        assert len(split_document(source, is_seam=encoder._is_seam)) > 2
    assert encoder.encode([source])[0].tolist() == tokenizer.encode(source).ids


def _with_start(tokenizer: tokenizers.Tokenizer, template: str) -> tokenizers.Tokenizer:
    """The tokenizer with what generation gets from it: a BOS before every text, perhaps an end after it."""
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_a_document_begins_with_the_bos_that_the_tokenizer_adds_as_a_prompt_does(tmp_path, own_cache, template):
    plain, added = _byte_tokenizer(), _with_start(_byte_tokenizer(), template)
    (tmp_path / "book").mkdir()
    for name, text in (("a.txt", "abc"), ("b.txt", "de")):
        (tmp_path / "book" / name).write_text(text)
    letters = {char: plain.token_to_id(char) for char in "abcde"}
    windows = _open([str(tmp_path / "book")], window=7, held_out_windows=0, tokenizer=added, vocab_size=None)
    expected = [256, *(letters[char] for char in "abc"), 256, letters["d"], letters["e"]]
    assert _take(windows, 1) == [expected]
    assert expected[:4] == added.encode("abc").ids[:4]
    without = _open([str(tmp_path / "book")], window=5, held_out_windows=0, tokenizer=plain, vocab_size=None)
    assert _take(without, 1) == [[letters[char] for char in "abcde"]]
    assert len(list(own_cache.rglob("*.npy"))) == 2


def test_a_stream_of_documents_has_a_bos_before_each(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n')
    added = _with_start(_byte_tokenizer(), "<s> $A")
    windows = _open([f"hf:{tmp_path}"], window=7, held_out_windows=0, tokenizer=added)
    letters = {char: added.token_to_id(char) for char in "abcde"}
    assert windows.next().tolist() == [256, *(letters[char] for char in "abc"), 256, letters["d"], letters["e"]]


def test_a_tokenizer_that_adds_only_an_end_gives_no_start():
    assert (
        Encoder(_with_start(_byte_tokenizer(), "$A </s>")).encode(["a"])[0].tolist()
        == _byte_tokenizer().encode("a").ids
    )


# Held-out windows and order


@given(
    lengths=st.lists(st.integers(30, 200), min_size=1, max_size=3),
    window=st.integers(2, 9),
    held_out=st.integers(0, 4),
    seed=st.integers(0, 5),
)
def test_training_never_sees_a_held_out_token_and_one_epoch_sees_every_other_window(
    tmp_path_factory, lengths, window, held_out, seed
):
    folder = tmp_path_factory.mktemp("ids")
    starts = np.cumsum([0, *lengths])
    train = [_ids(folder, length, f"{i}.npy", int(starts[i])) for i, length in enumerate(lengths)]
    windows = _open(train, window, held_out, seed=seed)
    kept = set(windows.held_out.ravel().tolist())
    assert len(kept) == held_out * window
    seen = _take(windows, 3 * sum(lengths) // window)
    assert not kept & {token for row in seen for token in row}
    grid = {
        int(start) + index
        for start, length in zip(starts, lengths, strict=False)
        for index in range(length)[::window]
        if index + window <= length
    }
    expected = grid - {row[0] for row in windows.held_out.tolist()}
    assert {row[0] for row in seen} == expected
    assert all(row == list(range(row[0], row[0] + window)) for row in seen)


def test_each_epoch_visits_every_window_once_in_a_new_order(tmp_path):
    windows = _open([_ids(tmp_path, 80)], held_out_windows=2)
    first, second = _take(windows, 8), _take(windows, 8)
    assert sorted(first) == sorted(second) and len({tuple(row) for row in first}) == 8
    assert first != second


def test_order_is_a_function_of_the_seed_and_held_out_windows_are_not(tmp_path):
    train = [_ids(tmp_path, 400)]
    one, same, other = (_open(train, seed=seed) for seed in (1, 1, 2))
    rows = [_take(windows, 40) for windows in (one, same, other)]
    assert rows[0] == rows[1] != rows[2]
    assert (one.held_out == same.held_out).all() and (one.held_out == other.held_out).all()


def test_held_out_windows_lie_spread_over_the_text(tmp_path):
    held_out = _open([_ids(tmp_path, 100)], window=10, held_out_windows=2).held_out
    assert held_out[:, 0].tolist() == [20, 70]  # the middles of two halves of ten windows, rounded down


def test_held_out_text_of_its_own_leaves_all_training_windows(tmp_path):
    train, test = _ids(tmp_path, 80), _ids(tmp_path, 40, "test.npy", 1000)
    windows = _open([train], held_out=(test,), held_out_windows=5)
    assert sorted(row[0] for row in windows.held_out.tolist()) == [1000, 1008, 1016, 1024, 1032]
    assert sorted(row[0] for row in _take(windows, 10)) == list(range(0, 80, 8))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 60))
def test_sources_take_turns_by_weight(tmp_path_factory, weights, count):
    folder = tmp_path_factory.mktemp("ids")
    train = [_ids(folder, 64, f"{index}.npy", 1000 * index) for index in range(len(weights))]
    windows = _open(train, held_out_windows=0, weights=tuple(map(float, weights)))
    turns = [row[0] // 1000 for row in _take(windows, count)]
    for index, weight in enumerate(weights):
        assert abs(turns.count(index) - count * weight / sum(weights)) < len(weights)


def test_without_weights_sources_take_turns_by_size(tmp_path):
    train = [_ids(tmp_path, 80, "a.npy"), _ids(tmp_path, 240, "b.npy", 1000)]
    windows = _open(train, held_out_windows=0)
    assert [row[0] < 1000 for row in _take(windows, 40)].count(True) == 10
    assert [round(source.share, 3) for source in windows.sources] == [0.25, 0.75]
    assert [(source.tokens, source.train_windows) for source in windows.sources] == [(80, 10), (240, 30)]


def test_copies_of_a_file_in_a_folder_count_once(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("abcdefgh" * 4)
    assert _open([str(tmp_path)]).sources[0].tokens == 32


@given(window=st.integers(2, 200), seed=st.integers(0, 3))
def test_a_copied_passage_stands_behind_the_one_it_repeats(tmp_path_factory, window, seed):
    train = [_ids(tmp_path_factory.mktemp("ids"), 10 * window)]  # every id once
    plain, copied = (_open(train, window, seed=seed, copies=copies) for copies in (0.0, 1.0))
    for before, after in zip(np.array(_take(plain, 8)), np.array(_take(copied, 8)), strict=True):
        changed = np.flatnonzero(before != after)
        assert (np.diff(changed) == 1).all() and window // 16 <= len(changed) <= max(1, window / 3)
        distances = before[changed] - after[changed]
        assert (distances == distances[0]).all() and len(changed) <= distances[0] <= changed[0]
    assert (plain.held_out == copied.held_out).all()


def test_as_many_windows_hold_a_copy_as_asked_for(tmp_path):
    train = [_ids(tmp_path, 32 * 1000)]
    plain, copied = (_take(_open(train, 32, 0, copies=copies), 1000) for copies in (0.0, 0.25))
    assert 200 < sum(one != other for one, other in zip(plain, copied, strict=True)) < 300


# Resuming


@given(before=st.integers(0, 30), after=st.integers(1, 30), seed=st.integers(0, 3))
def test_restored_windows_equal_uninterrupted_ones(tmp_path_factory, before, after, seed):
    folder = tmp_path_factory.mktemp("ids")
    train = [_ids(folder, 70, "a.npy"), _ids(folder, 130, "b.npy", 1000)]
    windows = _open(train, seed=seed, copies=0.5)
    _take(windows, before)
    state = json.loads(json.dumps(windows.state()))
    expected = _take(windows, after)
    resumed = _open(train, seed=seed, copies=0.5)
    resumed.restore(state)
    assert _take(resumed, after) == expected


@pytest.mark.parametrize("change", [{"seed": 1}, {"window": 9}, {"held_out_windows": 1}, {"copies": 0.5}])
def test_a_position_of_other_windows_is_refused(tmp_path, change):
    train = [_ids(tmp_path, 200)]
    with pytest.raises(InputError, match="saved position"):
        _open(train, **change).restore(_open(train).state())


# Streams


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory) -> str:
    """A data set of three shards that `datasets` streams without a network; document d is its number repeated."""
    folder = tmp_path_factory.mktemp("hub")
    for shard in range(3):
        rows = [{"text": chr(ord("a") + 8 * shard + row) * (5 + 3 * row)} for row in range(8)]
        (folder / f"train-{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}"


def _letters(rows) -> set[str]:
    return {letter for row in rows for letter in TOKENIZER.decode(list(row))}


def test_a_stream_is_packed_in_order_and_repeats(hub_folder):
    whole = "".join(chr(ord("a") + 8 * shard + row) * (5 + 3 * row) for shard in range(3) for row in range(8))
    windows = _open([hub_folder], window=20, held_out_windows=0)
    rows = _take(windows, 2 * len(whole) // 20)
    assert TOKENIZER.decode(np.concatenate(rows).tolist()) == (2 * whole)[: 20 * len(rows)]


def test_null_rows_of_a_stream_are_left_out_and_counted_as_they_come(tmp_path, caplog):
    rows = [{"text": letter} for letter in ("abcd", None, "efgh")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"hf:{tmp_path}"
    windows = _open([name], window=8, held_out_windows=0)
    assert [TOKENIZER.decode(row) for row in _take(windows, 10)] == ["abcdefgh"] * 10
    assert caplog.messages[0] == f"'{name}': 1 row is left out, because 'text' is null"
    assert caplog.messages[1:] == [f"'{name}': 10 rows are left out, because 'text' is null"]


def test_a_stream_that_breaks_is_one_line(hub_folder, monkeypatch):
    windows = _open([hub_folder], window=20, held_out_windows=0)

    def rows():
        yield {"text": "ab"}
        raise ConnectionError("the server\nhung up")

    windows._pools[0]._rows = rows()
    with pytest.raises(InputError, match=r"cannot read on in 'hf:.*the server hung up"):
        windows.next()


def test_a_stream_trains_on_no_document_it_held_out(hub_folder):
    windows = _open([hub_folder], window=20, held_out_windows=3)
    held_out, train = _letters(windows.held_out), _letters(_take(windows, 60))
    assert held_out and train and not held_out & train
    assert len(held_out | train) == 24


@pytest.mark.parametrize("before", [0, 1, 7, 40])
def test_a_restored_stream_equals_an_uninterrupted_one(hub_folder, before):
    windows = _open([hub_folder], window=13, held_out_windows=2)
    _take(windows, before)
    state = json.loads(json.dumps(windows.state()))
    expected = _take(windows, 40)
    resumed = _open([hub_folder], window=13, held_out_windows=2)
    resumed.restore(state)
    assert _take(resumed, 40) == expected


def test_a_stream_too_short_to_hold_out_is_refused(hub_folder):
    with pytest.raises(InputError, match="too short to hold out"):
        _open([hub_folder], window=20, held_out_windows=30)
    with pytest.raises(InputError, match="too short to hold out"):
        _open([hub_folder], window=350, held_out_windows=1).next()


def test_hub_ids_are_told_from_paths():
    (plain, with_split, with_config) = documents.find_sources(["owner/name", "owner/name:test", "hf:name:part:test"])
    assert plain.hub == documents.HubId("owner/name", None, "train")
    assert with_split.hub == documents.HubId("owner/name", None, "test")
    assert with_config.hub == documents.HubId("name", "part", "test")


def test_without_a_network_a_hub_id_gets_one_line(monkeypatch):
    import datasets

    def refuse(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\n(MaxRetryError)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"cannot open 'hf:owner/name'.*check the name and the network") as caught:
        _open(["owner/name"])
    assert "\n" not in str(caught.value)


def test_a_split_that_is_not_there_is_told_with_those_that_are(hub_folder):
    with pytest.raises(InputError, match=r"tran.*train"):
        _open([f"{hub_folder}:tran"])


# Bad input: one line that names the file and what to do


def _write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b"", r"empty.txt' is empty"),
        ("empty.jsonl", b"", r"empty.jsonl' is empty"),
        ("short.txt", b"abc", r"short.txt' holds 3 tokens, fewer than one window of 8"),
        ("latin.txt", b"caf\xe9 au lait", r"latin.txt' is not UTF-8 \(byte 3\)"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": oops}\n', r"bad.jsonl:2' is not JSON"),
        ("list.jsonl", b'{"text": "fine"}\n[1]\n', r"list.jsonl:2' is not a JSON object"),
        ("key.jsonl", b'{"body": "fine"}\n', r"key.jsonl:1' has no 'text', only 'body'.*--data.text-column"),
        ("kind.jsonl", b'{"text": 3}\n', r"kind.jsonl:1': 'text' is not text but int"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', r"latin.jsonl:1' is not UTF-8"),
        ("x.parquet", b"PAR1 no", r"x.parquet' is not a readable parquet file"),
        ("x.npy", b"no numbers", r"x.npy' is not a readable .npy file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, told):
    with pytest.raises(InputError, match=told) as caught:
        _open([_write(tmp_path, name, content)])
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_text_is_told_with_its_columns(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "number": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet' has no 'text', only 'body', 'number'"):
        _open([str(tmp_path / "x.parquet")])
    with pytest.raises(InputError, match=r"x\.parquet': 'number' is not text but int64"):
        _open([str(tmp_path / "x.parquet")], text_column="number")


def test_another_column_can_hold_the_text(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "abcdefgh"}\n')
    windows = _open([str(tmp_path / "x.jsonl")], text_column="body", held_out_windows=0)
    assert TOKENIZER.decode(windows.next().tolist()) == "abcdefgh"


@pytest.mark.parametrize(("ids", "told"), [([1, 2, 300] * 9, "id 300"), ([1, -7, 3] * 9, "id -7")])
def test_token_ids_outside_the_vocabulary_are_refused(tmp_path, ids, told):
    np.save(tmp_path / "x.npy", np.array(ids, np.int32))
    with pytest.raises(InputError, match=f"x.npy' holds token {told}, but the model's vocabulary is 0 to 255"):
        _open([str(tmp_path / "x.npy")], vocab_size=None)
    (tmp_path / "a.txt").write_text("text beside it")
    with pytest.raises(InputError, match=f"x.npy' holds token {told}"):
        _open([str(tmp_path)], vocab_size=256)


def test_a_table_of_token_ids_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 8), np.float32))
    with pytest.raises(InputError, match=r"one row of integer token ids, not float32\[2, 8\]"):
        _open([str(tmp_path / "x.npy")])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bok.txt", r"no such file or folder: '.*bok.txt'; did you mean '.*book.txt'"),
        ("zzz", r"no such file or folder: '.*zzz'"),
        ("*.parquet", r"no file matches"),
        ("nothing", r"the folder '.*nothing' holds no text"),
    ],
)
def test_a_missing_path_is_told_with_the_nearest_name(tmp_path, name, told):
    (tmp_path / "book.txt").write_text("text")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=told):
        _open([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("name", "near"), [("text:alise", "text:alice"), ("embeded", "embedded"), ("text-alice", "text:alice")]
)
def test_an_unknown_text_is_told_with_the_nearest_name(name, near):
    with pytest.raises(InputError, match=f"did you mean '{near}'"):
        _open([name])


def test_the_same_text_twice_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 9)
    file, folder = str(tmp_path / "a.txt"), str(tmp_path)
    with pytest.raises(InputError, match="hold the same text"):
        _open([file, folder])
    with pytest.raises(InputError, match="hold the same text"):
        _open([folder], held_out=(file,))


def test_more_held_out_windows_than_the_text_has_are_refused(tmp_path):
    with pytest.raises(InputError, match="gives 9 windows of 8 tokens to hold out, not 10"):
        _open([_ids(tmp_path, 80)], held_out_windows=10)


def test_text_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 9)
    with pytest.raises(InputError, match="needs a tokenizer"):
        _open([str(tmp_path / "a.txt")], tokenizer=None)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"train": ()},
        {"held_out_windows": -1},
        {"weights": (1.0, 2.0)},
        {"weights": (0.0,)},
        {"copies": 1.5},
    ],
)
def test_a_config_that_cannot_work_is_refused(options):
    with pytest.raises(InputError):
        DataConfig(**options)


def test_a_short_run_on_the_embedded_corpus_sees_every_kind(monkeypatch):
    names = texts.TRAINING_TEXTS
    monkeypatch.setattr(texts, "read_text", lambda name, progress=None: [chr(0x100 + names.index(name)) * 400])
    windows = _open(["embedded"], window=8, held_out_windows=16)
    assert {TOKENIZER.decode(row)[0] for row in windows.held_out.tolist()} == {
        chr(0x100 + i) for i in range(len(names))
    }
    kinds = [TOKENIZER.decode(row)[0] for row in _take(windows, 50)]
    assert len(set(kinds[:4])) == 4 and len(set(kinds)) == len(names)
    assert kinds.count(chr(0x100 + names.index("python-source"))) in (9, 10)  # 5 of 26
