"""GPT-2's files: fetching, safetensors, byte-pair encoding, folders for transformers and PEFT; errors of one line."""

import base64
import contextlib
import functools
import hashlib
import http.client
import json
import math
import os
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
CHOOSE = "name another file, or fetch or copy it again"  # what to do when reading fails, and when writing does
FREE = "free the disk or write to another directory"

class UserError(Exception):
    """A user's mistake, or a file that cannot be had, read or written: one line says what is wrong and what to do."""

@contextlib.contextmanager
def one_line(subject, advice: str):
    """Turns what goes wrong with `subject` inside the block into a UserError that ends in `advice`."""
    try:
        yield
    except Exception as error:  # bad files raise nearly anything in json and tiktoken: RecursionError, KeyError, ...
        reason = " ".join(str(error).split()) or "the contents do not fit together"
        raise UserError(f"{subject}: {reason}: {advice}") from error

def gpt2_shapes(n_layer: int, C: int, n_vocab: int = 50257, n_ctx: int = 1024) -> dict[str, tuple]:
    """State-dict name -> shape of GPT-2 at width C. Matrices are stored (in, out), as Conv1D's; lm_head is wte."""
    shapes = {"wte.weight": (n_vocab, C), "wpe.weight": (n_ctx, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    block = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
    block |= {"ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    for i in range(n_layer):
        for name, shape in block.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    return shapes

@functools.cache
def read_size(directory) -> tuple[int, int, int, int]:
    """n_layer, n_head, n_embd and n_positions of a directory's config.json. Raises UserError."""
    with one_line(path := Path(directory, "config.json"), CHOOSE):
        config = json.loads(path.read_bytes())
        size = tuple(config[name] for name in ("n_layer", "n_head", "n_embd", "n_positions"))
        if any(type(n) is not int or n < 1 for n in size) or size[2] % size[1]:
            raise ValueError(f"{size} layers, heads, width and positions")
        return size

# ---------------------------------------------------------------------------------------------------------------------
# Fetching
HUB = "https://huggingface.co/openai-community"
BPE_FILES = ("merges.txt", "vocab.json")
FILES = ("config.json", *BPE_FILES, "model.safetensors")  # small ones first: they fail fast
PAUSES = (0.5, 1.0, 2.0)  # seconds before each further try of one file

def fetch(model: str, files=FILES) -> Path:
    """Directory with `files` of `model`, after downloading those that are missing; if none is, no network is touched.
    A file gets its name only when whole and checked; until then it is FILE.part, which a later call resumes.
    COCORACLE_CACHE replaces the cache directory (~/.cache/cocoracle), COCORACLE_HUB the base address. Or UserError.
    """
    if model not in SIZES:
        raise UserError(f"{model!r} is no released GPT-2: choose one of {', '.join(SIZES)}")
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
                    raise UserError(f"{url} to {path}: {error}: check network/disk, or use --weights DIR") from error
                time.sleep(pauses.pop(0))
    return directory

class _Announced(urllib.request.BaseHandler):
    """Headers of a request's answers, the first one's first: a redirect alone tells size and digest of a large file."""
    def __init__(self):
        self.headers = {}

    def http_response(self, request, response):
        for name, value in response.headers.items():
            self.headers.setdefault(name.lower(), value)
        return response
    https_response = http_response

def _download(url: str, part: Path) -> None:
    """One request for what `part` lacks, then the checks. A cut file stays for the next try, a wrong one goes."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "cocoracle", "Range": f"bytes={have}-"})
    announced = _Announced()
    with urllib.request.build_opener(announced).open(request, timeout=30) as response, open(part, "a+b") as file:
        start = have if response.status == 206 else 0  # 200: Range was ignored, the whole file comes
        end = start + int(response.headers.get("Content-Length", -1))
        size = int(announced.headers.get("x-linked-size", end))
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
        tag = announced.headers.get("x-linked-etag") or announced.headers.get("etag", "")
        digest = tag.strip('"') if re.fullmatch('"?([0-9a-f]{40}|[0-9a-f]{64})"?', tag) else None
        hasher = hashlib.sha1(b"blob %d\0" % got) if digest and len(digest) == 40 else hashlib.sha256()
        file.seek(0)
        found = hashlib.file_digest(file, lambda: hasher).hexdigest()
        if got == size and (found == digest if digest else not start):  # two pieces and no digest: do they fit?
            return
    part.unlink()
    problem = f"received {got:,} bytes of digest {found}, announced were {size:,} of {digest or 'none'}"
    # A part that an earlier run left may be of an older version: try anew. What came in one piece is wrong for good.
    raise ConnectionError(problem) if start else UserError(f"{url}: {problem}: try later, or use --weights DIR")

# ---------------------------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes of header length N, N bytes of JSON, the tensors' bytes without holes (the package's README)
# In the order in which the package lays tensors out: the widest first, so that each is aligned.
DTYPES = {"I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16}
DTYPES |= {"F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}

def read_safetensors(path, expected: dict[str, tuple] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a file as views of its private memory map: no copy, and writing to them leaves the file alone.
    With `expected` (name -> shape), names lose a `transformer.` in front, the mask buffers of old files and an lm_head
    equal to wte are dropped, and the rest must be just those names in those shapes, of floats; or UserError."""
    with one_line(path, CHOOSE):
        return _read(path) if expected is None else match(_read(path), expected)

def match(tensors: dict, expected: dict) -> dict[str, torch.Tensor]:
    """`tensors` under exactly the names of `expected` (see read_safetensors); raises ValueError."""
    found = _unique([(name.removeprefix("transformer."), tensor) for name, tensor in tensors.items()])
    head, wte = found.get("lm_head.weight"), found.get("wte.weight")
    tied = head is not None and wte is not None and torch.equal(head, wte)
    for name in found.keys() - expected.keys():
        if tied and name == "lm_head.weight" or re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
            del found[name]
    for name in sorted(found.keys() | expected.keys()):
        wanted = tuple(expected[name]) if name in expected else "no such tensor"
        there = tuple(found[name].shape) if name in found else "missing"
        if name in found and not found[name].is_floating_point():
            there = "not of floats"
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
    tensors, spans = {}, [(0, 0, "")]
    for name, entry in table.items():
        try:
            tensors[name], begin, end = _tensor(entry, data)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: too few bytes
            wanted = f"dtype of {', '.join(DTYPES)}, shape, data_offsets just so far apart in {len(data):,} bytes"
            raise ValueError(f"tensor {name!r:.80} is {entry!r:.200}, expected {wanted}: truncated?") from error
        spans.append((begin, end, f"tensor {name!r:.80}"))
    spans = sorted(spans) + [(len(data), len(data), "the end of the file")]
    for (_, position, _), (begin, _, what) in zip(spans, spans[1:]):
        if begin != position:
            raise ValueError(f"{what} is at data byte {begin:,}, expected {position:,}: truncated, overlap or hole")
    return tensors

def _tensor(entry: dict, data: np.ndarray) -> tuple[torch.Tensor, int, int]:
    """The tensor of one entry of the header, and where in `data` it begins and ends; raises what _read catches."""
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    # A bool would pass isinstance(). The bounds keep prod() quick, and strides, even of nothing, in 63 bits.
    whole = len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**48 for n in shape + [begin, end])
    if not whole or math.prod(n or 1 for n in shape) >= 2**62 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("sizes that are none, or do not fit together")
    # A header of odd length leaves this unaligned, which x86 and ARM64 bear better than a copy.
    return torch.from_numpy(data[begin:end]).view(dtype).view(shape), begin, end

def _unique(pairs: list) -> dict:
    """json.loads hook: a dict, or ValueError where a name occurs twice (json would keep the last)."""
    table = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"the name {name!r:.80} occurs twice")
        table[name] = value
    return table

def write_safetensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes what the safetensors package does, byte for byte; or UserError, and an earlier file is left alone."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    with one_line(path, FREE):
        names = sorted(tensors, key=lambda name: (list(codes).index(tensors[name].dtype), name))
        header, end = {} if metadata is None else {"__metadata__": metadata}, 0
        for name in names:
            tensor, span = tensors[name], [end, end := end + tensors[name].nbytes]
            header[name] = {"dtype": codes[tensor.dtype], "shape": [*tensor.shape], "data_offsets": span}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with replacing(path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

@contextlib.contextmanager
def replacing(path):
    """A binary file to write, which takes the place of `path` when the block ends; a failure leaves `path` alone."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def write_atomic(path, text: str) -> None:
    """Writes `text` as UTF-8. Raises OSError, and then an earlier file is left alone and no other left behind."""
    with replacing(path) as file:
        file.write(text.encode())

# ---------------------------------------------------------------------------------------------------------------------
# Byte-pair encoding
# The SHA-256 that tiktoken_ext/openai_public.py publishes for r50k_base.tiktoken, GPT-2's encoding with a line a token.
# Checking the result, and not merges.txt and vocab.json themselves, admits a vocab.json that was saved anew.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

def read_bpe(directory) -> dict[bytes, int]:
    """GPT-2's 50,256 byte strings -> ranks, from a directory's merges.txt and vocab.json. Raises UserError."""
    # Without the variable tiktoken copies the files to a temporary directory, and reads them there ever after.
    files = [os.path.join(directory, name) for name in BPE_FILES]
    with one_line(" and ".join(files), "use GPT-2's own"), mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=""):
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*files)
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
        if hashlib.sha256(b"".join(lines)).hexdigest() != RANKS_SHA256:
            raise ValueError("not GPT-2's encoding")
    return ranks

# ---------------------------------------------------------------------------------------------------------------------
# Folders for transformers and PEFT
def save_model(directory, weights: dict, heads: int, ranks: dict[bytes, int], pattern: str, special: dict) -> None:
    """A folder that transformers' GPT2LMHeadModel and AutoTokenizer load; `weights` has the names of gpt2_shapes.
    The tokenizer gives the ids of tiktoken's Encoding of `ranks`, `pattern` and `special`, name -> id. UserError."""
    (n_vocab, C), end = weights["wte.weight"].shape, special["<|endoftext|>"]
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "bos_token_id": end, "eos_token_id": end}
    config |= {"n_layer": sum(name.endswith("ln_1.bias") for name in weights), "n_head": heads, "n_embd": C}
    config |= {"n_positions": len(weights["wpe.weight"]), "vocab_size": n_vocab, "activation_function": "gelu_new"}
    files = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}, "config.json": config}
    files["tokenizer.json"] = _tokenizer(ranks, pattern, special)
    _write_folder(directory, files, "model.safetensors", weights)

def _write_folder(directory, files: dict[str, dict], last: str, tensors: dict) -> None:
    """Writes `files` (name -> content), then `tensors` as `last`, whose presence says that the folder is whole."""
    with one_line(directory, FREE):
        os.makedirs(directory, exist_ok=True)
        Path(directory, last).unlink(missing_ok=True)  # the new files would not fit an earlier one
        for name, content in files.items():
            write_atomic(Path(directory, name), json.dumps(content))
    write_safetensors(Path(directory, last), tensors, {"format": "pt"})

def _tokenizer(ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> dict:
    """tokenizer.json of tiktoken's rule: a piece that has a rank is one token; of any other, the two neighbours that
    together have the lowest rank are joined, until none have one."""
    # GPT-2's bytes_to_unicode (encoder.py): visible Latin-1 stands for itself, other bytes for letters from 256 on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = dict(zip(visible + hidden, [*visible, *range(256, 324)]))
    vocab, merges = {}, []
    for token in sorted(ranks, key=ranks.get):
        text = token.decode("latin-1").translate(letters)
        vocab[text] = ranks[token]
        for i in range(1, len(token)):  # all ways in which two tokens make this one, of which merges.txt has but one
            if token[:i] in ranks and token[i:] in ranks:
                merges.append(f"{text[:i]} {text[i:]}")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    flags = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False) | {"special": True}
    added = [{"id": i, "content": name, **flags} for name, i in special.items()]
    # The special tokens are in the vocabulary too, or they would be numbered on from its length.
    model = {"type": "BPE", "vocab": vocab | special, "merges": merges, "ignore_merges": True}
    steps = {"type": "Sequence", "pretokenizers": [split, level]}
    return {"added_tokens": added, "pre_tokenizer": steps, "decoder": level, "model": model}

def _peft_name(name: str) -> str:  # h.0.attn.c_attn.lora_a -> base_model.model.transformer...c_attn.lora_A.weight
    return f"base_model.model.transformer.{name[:-1]}{name[-1].upper()}.weight"

def save_adapter(directory, tensors: dict[str, torch.Tensor], rank: int, alpha: float, base: str) -> None:
    """A folder that PEFT loads onto the model that `base` names: x W + alpha / rank * (x A) B. UserError.
    `tensors` are A (in, r) and B (r, out) of each block's matrices, as h.0.attn.c_attn.lora_a and .lora_b."""
    modules = {name.split(".", 2)[2].rpartition(".")[0] for name in tensors}  # attn.c_attn, ...
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank}
    config |= {"lora_alpha": alpha, "target_modules": sorted(modules), "fan_in_fan_out": True, "inference_mode": True}
    turned = {_peft_name(name): tensor.t() for name, tensor in tensors.items()}  # PEFT's are (r, in) and (out, r)
    _write_folder(directory, {"adapter_config.json": config}, "adapter_model.safetensors", turned)

def read_adapter(directory, expected: dict[str, tuple], alpha: float | None = None) -> dict[str, torch.Tensor]:
    """The tensors of save_adapter or PEFT under our names; they must be just `expected`, name -> shape. UserError.
    An adapter that is no plain LoRA, or has another lora_alpha than `alpha`, would mean something else: refused."""
    ours = {_peft_name(name): name for name in expected}
    with one_line(directory, CHOOSE):
        config = json.loads(Path(directory, "adapter_config.json").read_text(encoding="utf-8"))
        wanted = {"peft_type": "LORA", "use_rslora": False, "use_dora": False, "lora_alpha": alpha}
        for name, value in wanted.items():
            if value is not None and config.get(name, value) != value:
                raise ValueError(f"{name} is {config[name]!r:.80}, expected {value!r}")
        turned = []
        for name, tensor in _read(Path(directory, "adapter_model.safetensors")).items():
            turned.append((ours.get(name, name), tensor.t() if tensor.dim() == 2 else tensor))
        return match(_unique(turned), expected)
