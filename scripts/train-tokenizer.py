"""Trains the byte-level BPE of the quickstart base: train-tokenizer.py TEXT_DIR OUT_DIR VOCABULARY."""

import json
import pathlib
import sys

import pyarrow.parquet as parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

text_dir, out_dir, vocabulary = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
first = sorted(text_dir.glob("*.parquet"))[0]
documents = parquet.read_table(first, columns=["content"])["content"].to_pylist()[:3000]

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=vocabulary,
    special_tokens=["<s>", "</s>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
tokenizer.train_from_iterator(documents, trainer)

out_dir.mkdir(parents=True, exist_ok=True)
tokenizer.save(str(out_dir / "tokenizer.json"), pretty=False)
config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_bos_token": False,
    "add_eos_token": False,
    "model_max_length": 256,
    "clean_up_tokenization_spaces": False,
}
(out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
