"""Python source to tokens: find files, split, train a byte-level BPE, encode.

Only the content of the files matters, never the time or the order in which the system lists them, so the same folders
give the same corpus.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stagedspec.training.sources import source_folder

END_OF_TEXT = "<|endoftext|>"
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "_vendor", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Encoded source.

    train, heldout: LongTensor [T], documents separated by the end-of-text token.
    heldout_bytes: UTF-8 bytes that `heldout` encodes, the denominator of bits per byte.
    """

    train: torch.Tensor
    heldout: torch.Tensor
    heldout_bytes: int

    def save(self, path: Path) -> None:
        tensors = {"train": self.train.int(), "heldout": self.heldout.int()}
        save_file(tensors, path, metadata={"heldout_bytes": str(self.heldout_bytes)})

    @classmethod
    def load(cls, path: Path) -> "Corpus":
        """Reads what `save` wrote. Raises ValueError if the file is damaged or not a corpus."""
        try:
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                heldout_bytes = int(file.metadata()["heldout_bytes"])
            return cls(tensors["train"].long(), tensors["heldout"].long(), heldout_bytes)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no corpus ({error}); remove it to build it again") from error


def read_documents(sources: list[str]) -> tuple[list[str], list[str]]:
    """Reads every .py file below the sources and returns (train, heldout) documents.

    One file in fifty is held out, chosen by a hash of its text, but at least one. Duplicates, files under 200 bytes or
    over 200 kB, files that are not UTF-8, and folders of tests and vendored copies are left out.

    Raises ValueError if fewer than two files are found.
    """
    train: list[tuple[bytes, str]] = []  # with their hashes
    heldout: list[tuple[bytes, str]] = []
    seen: set[bytes] = set()
    for source in sources:
        folder = source_folder(source)
        for path in sorted(folder.rglob("*.py")):
            if _SKIPPED_FOLDERS & set(path.relative_to(folder).parts[:-1]):
                continue
            data = path.read_bytes()
            digest = hashlib.sha256(data).digest()
            if not 200 <= len(data) <= 200_000 or digest in seen:
                continue
            seen.add(digest)
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                continue
            bucket = heldout if digest[0] * 256 + digest[1] < 65536 // 50 else train
            bucket.append((digest, text.replace("\r\n", "\n")))
    if not heldout and len(train) > 1:  # few files, and no hash was low enough: hold out the lowest
        heldout.append(min(train))
        train.remove(heldout[0])
    if not train or not heldout:
        raise ValueError(f"too little Python source below {sources}: no file left to train on or to hold out")
    # In the order of hashes, neighbouring documents are unrelated.
    return [text for _, text in sorted(train)], [text for _, text in sorted(heldout)]


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's pre-tokenizer and one special token, end of text (id 0)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Documents to one LongTensor [T], each followed by the end-of-text token."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.long)


def build(sources: list[str], vocab_size: int) -> tuple[Corpus, PreTrainedTokenizerFast]:
    """Reads the sources, trains the tokenizer on the training part and encodes both parts."""
    train, heldout = read_documents(sources)
    tokenizer = train_tokenizer(train, vocab_size)
    heldout_bytes = sum(len(text.encode()) + 1 for text in heldout)
    return Corpus(encode(train, tokenizer), encode(heldout, tokenizer), heldout_bytes), tokenizer
