"""GPT-2's released files: fetching, safetensors, byte-pair encoding. Any failure is a WeightsError of one line."""

import base64
import contextlib
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import sys
import time
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import tiktoken.load
import torch

# name -> (n_layer, n_head, n_embd), from each release's config.json
SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}

class WeightsError(Exception):
    """A weights or tokenizer file cannot be had, read or written: one line says what is wrong and what to do."""

@contextlib.contextmanager
def _one_line(subject, advice: str):
    """Turns what goes wrong with `subject` inside the block into a WeightsError that ends in `advice`."""
    try:
        yield
    except Exception as error:  # bad files raise nearly anything in json and tiktoken: RecursionError, KeyError, ...
        # torch.load's refusal of code is long, and tells how to run the code after all.
        reason = "more than tensors" if isinstance(error, pickle.UnpicklingError) else " ".join(str(error).split())
        raise WeightsError(f"{subject}: {reason or 'the contents do not fit together'}: {advice}") from error

def gpt2_shapes(n_layer: int, C: int, n_vocab: int = 50257, n_ctx: int = 1024) -> dict[str, tuple]:
    """State-dict name -> shape of GPT-2 at width C. Matrices are stored (in, out), as Conv1D's; lm_head is wte."""
    shapes = {"wte.weight": (n_vocab, C), "wpe.weight": (n_ctx, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    matrices = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    for i in range(n_layer):
        for name, shape in {"ln_1": (C,), "ln_2": (C,), **matrices}.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    return shapes

# ---------------------------------------------------------------------------------------------------------------------
# Fetching
HUB = "https://huggingface.co/openai-community"
BPE_FILES = ("merges.txt", "vocab.json")
FILES = ("config.json", *BPE_FILES, "model.safetensors")  # small ones first: they fail fast
PAUSES = (0.5, 1.0, 2.0)  # seconds before each further try of one file

def fetch(model: str, files=FILES) -> Path:
    """Directory with `files` of `model`, after downloading those that are missing; if none is, no network is touched.

    A file gets its name only when whole and checked; until then it is FILE.part, which a later call resumes.
    COCORACLE_CACHE replaces the cache directory (~/.cache/cocoracle), COCORACLE_HUB the base address. Or WeightsError.
    """
    if model not in SIZES:
        raise WeightsError(f"{model!r} is no released GPT-2: choose one of {', '.join(SIZES)}")
    cache = os.environ.get("COCORACLE_CACHE") or (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/cocoracle"
    directory = Path(os.path.expanduser(cache), model)
    for name in files:
        url = f"{(os.environ.get('COCORACLE_HUB') or HUB).rstrip('/')}/{model}/resolve/main/{name}"
        path, part, pauses = directory / name, directory / f"{name}.part", list(PAUSES)
        while not path.is_file():
            try:
                directory.mkdir(parents=True, exist_ok=True)
                _download(url, part)
                os.replace(part, path)
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: the address is none
                if (status := getattr(error, "code", None)) == 416:  # the part is not shorter: of another file
                    part.unlink(missing_ok=True)
                if not pauses or status in (401, 403, 404):
                    raise WeightsError(f"{url} to {path}: {error}: check network/disk, or use --weights DIR") from error
                time.sleep(pauses.pop(0))
    return directory

def _download(url: str, part: Path) -> None:
    """One request for what `part` lacks, then the checks. A cut file stays for the next try, a wrong one goes."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "cocoracle", "Range": f"bytes={have}-"})
    seen = []  # headers of redirects too: only there the hub announces size and SHA-256 of a large file
    watch = urllib.request.BaseHandler()
    watch.http_response = watch.https_response = lambda _, response: seen.append(response.headers) or response
    with urllib.request.build_opener(watch).open(request, timeout=30) as response, open(part, "a+b") as file:
        announced = {name.lower(): value for headers in reversed(seen) for name, value in headers.items()}
        start = have if response.status == 206 else 0  # 200: Range was ignored, the whole file comes
        end = start + int(response.headers.get("Content-Length", -1))
        size = int(announced.get("x-linked-size", end))
        print(f"fetching {url} ({size / 1e6:,.1f} MB)", file=sys.stderr)
        file.truncate(start)
        while block := response.read(1 << 20):
            file.write(block)
            if sys.stderr.isatty():
                print(f"{file.tell() / max(size, 1):6.1%}", end="\r", file=sys.stderr, flush=True)
        file.flush()
        os.fsync(file.fileno())
        got = file.tell()
        if got < end:  # read() simply ends when the connection is cut
            raise ConnectionError(f"cut after {got:,} of {size:,} bytes")
        # SHA-256 of large files, git blob SHA-1 of small ones; a weak tag, W/"...", promises nothing about bytes.
        tag = announced.get("x-linked-etag") or announced.get("etag", "")
        digest = tag.strip('"') if re.fullmatch('"?([0-9a-f]{40}|[0-9a-f]{64})"?', tag) else None
        hasher = hashlib.sha1(b"blob %d\0" % got) if digest and len(digest) == 40 else hashlib.sha256()
        file.seek(0)
        found = hashlib.file_digest(file, lambda: hasher).hexdigest()
        if got == size and (found == digest if digest else not start):  # two pieces and no digest: do they fit?
            return
    part.unlink()
    problem = f"received {got:,} bytes of digest {found}, announced were {size:,} of {digest or 'none'}"
    # A part that an earlier run left may be of an older version: try anew. What came in one piece is wrong for good.
    raise ConnectionError(problem) if start else WeightsError(f"{url}: {problem}: try later, or use --weights DIR")

# ---------------------------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes of header length N, N bytes of JSON, the tensors' bytes without holes (the package's README)
# In the order in which the package lays tensors out: the widest first, so that each is aligned.
DTYPES = {"I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16}
DTYPES |= {"F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}

def read_safetensors(path, expected: dict[str, tuple] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a file as views of its private memory map: no copy, and writing to them leaves the file alone.

    With `expected` (name -> shape), names lose a `transformer.` in front, the mask buffers of old files and an lm_head
    equal to wte are dropped, and the rest must be just those names in those shapes, floating-point.
    Raises WeightsError for a file that is missing, malformed or not as expected.
    """
    with _one_line(path, "name another file, or fetch or copy it again"):
        tensors = _read(path)
        return tensors if expected is None else _match(tensors, expected)

def read_pickle(path, expected: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """A state dict saved by torch.save, as read_safetensors with `expected` reads it; no code in the file is run."""
    with _one_line(path, "name another file, or fetch or copy it again"):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return _match(tensors, expected)

def _match(tensors: dict, expected: dict) -> dict[str, torch.Tensor]:
    """`tensors` under exactly the names of `expected`; raises ValueError."""
    found = _unique([(name.removeprefix("transformer."), tensor) for name, tensor in tensors.items()])
    head, wte = found.get("lm_head.weight"), found.get("wte.weight")
    tied = head is not None and wte is not None and torch.equal(head, wte)
    spare = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)" + r"|lm_head\.weight" * tied)  # causal masks, and wte twice
    found = {name: tensor for name, tensor in found.items() if name in expected or not spare.fullmatch(name)}
    for name in sorted(found.keys() | expected.keys()):
        tensor, wanted = found.get(name), tuple(expected[name]) if name in expected else "no such tensor"
        there = "missing" if tensor is None else tuple(tensor.shape) if tensor.is_floating_point() else "not of floats"
        if there != wanted:
            raise ValueError(f"tensor {name!r:.80} is {there}, expected {wanted}")
    return found

def _read(path) -> dict[str, torch.Tensor]:
    """The tensors of a file; raises ValueError and others."""
    mapped = np.memmap(path, np.uint8, mode="c")  # "c": private, copied on writing
    length = int.from_bytes(mapped[:8].tobytes(), "little")
    if length > min(len(mapped) - 8, 100_000_000):  # bytes: the safetensors package's limit too
        raise ValueError(f"truncated, or no safetensors file: {len(mapped):,} bytes, a header of {length:,}")
    table = json.loads(mapped[8 : 8 + length].tobytes().decode(), object_pairs_hook=_unique)
    data = mapped[8 + length :]
    metadata = table.pop("__metadata__", {}) if isinstance(table, dict) else None
    if not isinstance(metadata, dict) or any(type(value) is not str for value in metadata.values()):
        raise ValueError("the header is no table of tensors, or its __metadata__ no table of strings")
    tensors, spans = {}, []
    for name, entry in table.items():
        with contextlib.suppress(KeyError, TypeError, ValueError, RuntimeError):  # RuntimeError: too few bytes
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            # A bool would pass isinstance(). The bounds keep prod() quick, and strides, even of nothing, in 63 bits.
            whole = len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**48 for n in shape + [begin, end])
            if whole and math.prod(n or 1 for n in shape) < 2**62 and end - begin == math.prod(shape) * dtype.itemsize:
                # A header of odd length leaves this unaligned, which x86 and ARM64 bear better than a copy.
                tensors[name] = torch.from_numpy(data[begin:end]).view(dtype).view(shape)
                spans.append((begin, end, f"tensor {name!r:.80}"))
        if name not in tensors:
            wanted = f"dtype of {', '.join(DTYPES)}, shape, data_offsets just so far apart in {len(data):,} bytes"
            raise ValueError(f"tensor {name!r:.80} is {entry!r:.200}, expected {wanted}: truncated?")
    spans = [(0, 0, ""), *sorted(spans), (len(data), 0, "the end of the file")]
    for (_, position, _), (begin, _, what) in zip(spans, spans[1:]):
        if begin != position:
            raise ValueError(f"{what} is at data byte {begin:,}, expected {position:,}: truncated, overlap or hole")
    return tensors

def _unique(pairs: list) -> dict:
    """json.loads hook: a dict, or ValueError where a name occurs twice (json would keep the last)."""
    table = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"the name {name!r:.80} occurs twice")
        table[name] = value
    return table

def write_safetensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes what the safetensors package does, byte for byte; or WeightsError, and an earlier file is left alone."""
    path, codes = Path(path), {dtype: code for code, dtype in DTYPES.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with _one_line(path, "free the disk or write to another directory"), contextlib.ExitStack() as cleanup:
        tensors = dict(sorted(tensors.items(), key=lambda kv: ([*codes, kv[1].dtype].index(kv[1].dtype), kv[0])))
        header, end = {} if metadata is None else {"__metadata__": metadata}, 0
        for name, tensor in tensors.items():
            if tensor.dtype not in codes:
                raise ValueError(f"tensor {name!r} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
            span = [end, end := end + tensor.nbytes]
            header[name] = {"dtype": codes[tensor.dtype], "shape": [*tensor.shape], "data_offsets": span}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        cleanup.callback(temporary.unlink, missing_ok=True)
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

# ---------------------------------------------------------------------------------------------------------------------
# Byte-pair encoding
# The SHA-256 that tiktoken_ext/openai_public.py publishes for r50k_base.tiktoken, GPT-2's encoding with a line a token.
# Checking the result, and not merges.txt and vocab.json themselves, admits a vocab.json that was saved anew.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

def read_bpe(directory) -> dict[bytes, int]:
    """GPT-2's 50,256 byte strings -> ranks, from a directory's merges.txt and vocab.json. Raises WeightsError."""
    # Without the variable tiktoken copies the files to a temporary directory, and reads them there ever after.
    files = [os.path.join(directory, name) for name in BPE_FILES]
    with _one_line(" and ".join(files), "use GPT-2's own"), mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=""):
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*files)
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
        if hashlib.sha256(b"".join(lines)).hexdigest() != RANKS_SHA256:
            raise ValueError("not GPT-2's encoding")
    return ranks

def write_transformers(directory, weights: dict, config: dict, bpe=None, pattern="", special=None) -> None:
    """A directory that transformers' from_pretrained loads; with `bpe`, a directory with the encoding's files, it has a
    tokenizer that splits text by `pattern` and knows the `special` tokens, name -> id. Raises WeightsError."""
    files = {"config.json": config}
    with _one_line(directory, "free the disk or write to another directory"):
        os.makedirs(directory, exist_ok=True)
        if bpe:
            merges, vocab = (Path(bpe, name).read_text(encoding="utf-8") for name in BPE_FILES)
            level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            flags = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False) | {"special": True}
            files["tokenizer.json"] = {
                "added_tokens": [{"id": i, "content": name, **flags} for name, i in special.items()],
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "decoder": level,
                "model": {"type": "BPE", "vocab": json.loads(vocab), "merges": merges.splitlines()[1:]}}
            files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name, content in files.items():
            Path(directory, name).write_text(json.dumps(content), encoding="utf-8")
    write_safetensors(Path(directory, "model.safetensors"), weights, {"format": "pt"})
