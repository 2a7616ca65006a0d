"""Writes small parquet files by pyarrow, Hugging Face datasets, DuckDB and Polars, and what is in them.

    python tests/parity/parquet_writers.py ROOT

ROOT is the repository: tests/golden/parquet/ in it is written anew. `expected.json` there says of every file whether it
holds tokens or text, which documents, or by which words reading it has to be refused. worker/data/tests/writers.rs reads
them without Python.
"""

import json
import pathlib
import random
import shutil
import sys

import datasets
import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

# The tokenizer of the tests knows the words w1 to w499; text is these words, so that tokens and text say the same.
WORDS = 499
LENGTH = 8

rng = random.Random(17)
DOCUMENTS = [[rng.randint(1, WORDS) for _ in range(rng.randint(0, 20))] for _ in range(40)]
DOCUMENTS[3] = []
FIXED = [[rng.randint(1, WORDS) for _ in range(LENGTH)] for _ in range(12)]
WITH_NULL_ROW = DOCUMENTS[:5] + [None] + DOCUMENTS[5:8]
WITH_NULL_TOKEN = DOCUMENTS[:5] + [[1, None, 3]] + DOCUMENTS[5:8]


def text(documents):
    return [None if row is None else " ".join(f"w{token}" for token in row) for row in documents]


class Folder:
    """The files, and what is in them."""

    def __init__(self, path):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        self.path = path
        self.files = {}

    def holds(self, name, kind, column, documents="documents"):
        self.files[name] = {"kind": kind, "column": column, "documents": documents}
        return str(self.path / name)

    def refused(self, name, kind, column, *words):
        self.files[name] = {"kind": kind, "column": column, "refused": list(words)}
        return str(self.path / name)


def pyarrow_tokens(folder):
    def write(path, kind, documents=DOCUMENTS, row_nullable=True, **options):
        field = pa.field("input_ids", kind, nullable=row_nullable)
        array = pa.array(documents, type=kind)
        urls = pa.array([f"https://example.org/{row}" for row in range(len(documents))])
        schema = pa.schema([pa.field("url", pa.string()), field])
        pq.write_table(pa.table([urls, array], schema=schema), path, **options)

    def tokens(name, kind, documents="documents", **options):
        rows = {"documents": DOCUMENTS, "fixed": FIXED, "none": []}[documents]
        write(folder.holds(f"pyarrow-{name}.parquet", "tokens", "input_ids", documents), kind, rows, **options)

    tokens("list-int32-zstd", pa.list_(pa.int32()), compression="zstd")
    tokens("large-list-int64-snappy-v2", pa.large_list(pa.int64()), compression="snappy", data_page_version="2.0")
    tokens("list-uint16-gzip-plain", pa.list_(pa.uint16()), compression="gzip", use_dictionary=False)
    tokens("list-int16-lz4", pa.list_(pa.int16()), compression="lz4")
    tokens("list-uint32-delta-v2", pa.list_(pa.uint32()), compression="zstd", data_page_version="2.0",
           use_dictionary=False, column_encoding={"input_ids.list.element": "DELTA_BINARY_PACKED", "url": "PLAIN"})
    tokens("list-int32-split", pa.list_(pa.int32()), compression="none", use_dictionary=False,
           column_encoding={"input_ids.list.element": "BYTE_STREAM_SPLIT", "url": "PLAIN"})
    # Format 1.0 has no unsigned integers of 32 bits: they are written as 64.
    tokens("list-uint32-format1", pa.list_(pa.uint32()), version="1.0")
    tokens("list-uint64", pa.list_(pa.uint64()))
    tokens("fixed-int32", pa.list_(pa.int32(), LENGTH), "fixed")
    tokens("fixed-uint16-v2", pa.list_(pa.uint16(), LENGTH), "fixed", data_page_version="2.0")
    tokens("list-of-old-names", pa.list_(pa.int32()), use_compliant_nested_type=False)
    tokens("list-without-schema", pa.list_(pa.int32()), store_schema=False)
    tokens("list-never-null", pa.list_(pa.field("element", pa.int32(), nullable=False)), row_nullable=False)
    # Pages of a few values: without a page index they cut rows in two.
    tokens("list-cut-pages", pa.list_(pa.int32()), data_page_size=64, write_batch_size=7, use_dictionary=False)
    tokens("list-cut-pages-dictionary-v2", pa.list_(pa.int32()), data_page_size=32, write_batch_size=5,
           data_page_version="2.0")
    # A dictionary that becomes too large in the middle: the pages behind it are plain.
    tokens("list-dictionary-ends", pa.list_(pa.int64()), dictionary_pagesize_limit=256, data_page_size=128,
           write_batch_size=8)
    tokens("list-page-index-checksums", pa.list_(pa.int32()), data_page_size=64, write_batch_size=7,
           write_page_index=True, write_page_checksum=True)
    tokens("list-row-groups", pa.list_(pa.int32()), row_group_size=7)
    tokens("no-rows", pa.list_(pa.int32()), "none")

    # A file whose middle row group has no rows.
    path = folder.holds("pyarrow-empty-row-group.parquet", "tokens", "input_ids")
    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    with pq.ParquetWriter(path, schema) as writer:
        for rows in (DOCUMENTS[:20], [], DOCUMENTS[20:]):
            writer.write_table(pa.table([pa.array(rows, type=schema.field(0).type)], schema=schema))

    def refused(name, kind, documents, *words, **options):
        write(folder.refused(f"pyarrow-{name}.parquet", "tokens", "input_ids", *words), kind, documents, **options)

    refused("null-row", pa.list_(pa.int32()), WITH_NULL_ROW, "row group 0, row 5", "is null")
    refused("null-token", pa.list_(pa.int32()), WITH_NULL_TOKEN, "row group 0, row 5", "holds a null token")
    refused("null-fixed", pa.list_(pa.int32(), LENGTH), FIXED[:4] + [None], "row group 0, row 4", "is null")
    refused("float", pa.list_(pa.float32()), [[1.0]], '"input_ids"', "not a list of integers", "Float32")
    refused("list-of-lists", pa.list_(pa.list_(pa.int32())), [[[1]]], '"input_ids"', "not a list of integers")
    refused("plain-integers", pa.int32(), [1, 2], '"input_ids"', "not a list of integers", "Int32")
    refused("bytes", pa.binary(), [b"\1\0"], '"input_ids"', "not a list of integers", "Binary")
    refused("brotli", pa.list_(pa.int32()), DOCUMENTS, '"input_ids"', "brotli", "zstd", compression="brotli")
    refused("negative", pa.list_(pa.int32()), [[1], [2, -3]], "row group 0, row 1", "token id -3")
    refused("outside", pa.list_(pa.uint32()), [[1], [2, 4_000_000_000]], "row group 0, row 1", "token id 4000000000")


def pyarrow_text(folder):
    def write(path, array, **options):
        dump = pa.array(["a"] * len(array))
        pq.write_table(pa.table({"dump": dump, "content": array}), path, **options)

    def texts(name, kind, documents="documents", **options):
        rows = {"documents": DOCUMENTS, "none": []}[documents]
        array = pa.array(text(rows), type=pa.string())
        array = array.dictionary_encode() if kind == "dictionary" else array.cast(kind)
        write(folder.holds(f"pyarrow-{name}.parquet", "text", "content", documents), array, **options)

    texts("text-zstd", pa.string(), compression="zstd")
    texts("text-large-gzip-v2", pa.large_string(), compression="gzip", data_page_version="2.0")
    texts("text-view-lz4", pa.string_view(), compression="lz4")
    texts("text-dictionary", "dictionary", row_group_size=9)
    texts("text-delta-v2", pa.string(), use_dictionary=False, data_page_version="2.0",
          column_encoding={"content": "DELTA_BYTE_ARRAY", "dump": "PLAIN"})
    texts("text-delta-length", pa.string(), use_dictionary=False,
          column_encoding={"content": "DELTA_LENGTH_BYTE_ARRAY", "dump": "PLAIN"})
    texts("text-small-pages", pa.string(), data_page_size=64, write_batch_size=3)
    texts("text-no-rows", pa.string(), "none")

    def refused(name, array, *words, **options):
        write(folder.refused(f"pyarrow-{name}.parquet", "text", "content", *words), array, **options)

    refused("text-null", pa.array(text(WITH_NULL_ROW)), "row group 0, row 5", "the text is null")
    refused("text-binary", pa.array(text(DOCUMENTS), type=pa.string()).cast(pa.binary()), '"content"', "Binary", "not text")
    refused("text-list", pa.array([["w1", "w2"]]), '"content"', "not text")
    refused("text-brotli", pa.array(text(DOCUMENTS)), '"content"', "brotli", "zstd", compression="brotli")


def huggingface(folder):
    datasets.disable_progress_bars()

    def write(path, rows, feature, column, **options):
        features = datasets.Features({"id": datasets.Value("int64"), column: feature})
        content = {"id": list(range(len(rows))), column: rows}
        datasets.Dataset.from_dict(content, features=features).to_parquet(path, **options)

    def tokens(name, feature, documents="documents", **options):
        rows = {"documents": DOCUMENTS, "fixed": FIXED, "none": []}[documents]
        path = folder.holds(f"datasets-{name}.parquet", "tokens", "input_ids", documents)
        write(path, rows, feature, "input_ids", **options)

    value = datasets.Value
    tokens("list-int32", datasets.List(value("int32")))
    tokens("large-list-int64", datasets.LargeList(value("int64")), batch_size=9)
    tokens("list-uint16", datasets.List(value("uint16")))
    tokens("fixed-int32", datasets.List(value("int32"), length=LENGTH), "fixed")
    tokens("no-rows", datasets.List(value("int32")), "none")
    for name, kind in (("text", "string"), ("text-large", "large_string")):
        path = folder.holds(f"datasets-{name}.parquet", "text", "text")
        write(path, text(DOCUMENTS), value(kind), "text")


def duck(folder):
    database = duckdb.connect()

    def write(path, column, kind, rows, options):
        database.execute(f"CREATE OR REPLACE TABLE rows (id INTEGER, {column} {kind})")
        if rows:
            database.executemany("INSERT INTO rows VALUES (?, ?)", [[number, row] for number, row in enumerate(rows)])
        query = f"SELECT {column} FROM rows ORDER BY id"
        database.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, {options})")

    def tokens(name, kind, options, documents="documents"):
        rows = {"documents": DOCUMENTS, "fixed": FIXED, "none": []}[documents]
        path = folder.holds(f"duckdb-{name}.parquet", "tokens", "input_ids", documents)
        write(path, "input_ids", kind, rows, options)

    tokens("list-integer-snappy", "INTEGER[]", "CODEC snappy")
    tokens("list-bigint-zstd-v2", "BIGINT[]", "CODEC zstd, PARQUET_VERSION v2")
    tokens("list-usmallint-gzip", "USMALLINT[]", "CODEC gzip")
    tokens("list-uinteger-lz4", "UINTEGER[]", "CODEC lz4_raw")
    tokens("array-integer", f"INTEGER[{LENGTH}]", "CODEC uncompressed", "fixed")
    tokens("no-rows", "INTEGER[]", "CODEC snappy", "none")
    path = folder.refused("duckdb-null-row.parquet", "tokens", "input_ids", "row group 0, row 5", "is null")
    write(path, "input_ids", "INTEGER[]", WITH_NULL_ROW, "CODEC snappy")
    path = folder.refused("duckdb-brotli.parquet", "tokens", "input_ids", '"input_ids"', "brotli", "zstd")
    write(path, "input_ids", "INTEGER[]", DOCUMENTS, "CODEC brotli")
    write(folder.holds("duckdb-text-zstd.parquet", "text", "content"), "content", "VARCHAR", text(DOCUMENTS), "CODEC zstd")
    write(folder.holds("duckdb-text-v2.parquet", "text", "content"), "content", "VARCHAR", text(DOCUMENTS),
          "CODEC snappy, PARQUET_VERSION v2")


def polars(folder):
    def tokens(name, kind, documents="documents", **options):
        rows = {"documents": DOCUMENTS, "fixed": FIXED, "none": []}[documents]
        path = folder.holds(f"polars-{name}.parquet", "tokens", "input_ids", documents)
        pl.DataFrame({"input_ids": pl.Series(rows, dtype=kind)}).write_parquet(path, **options)

    tokens("list-int32-zstd", pl.List(pl.Int32), compression="zstd")
    tokens("list-int64-snappy", pl.List(pl.Int64), compression="snappy", row_group_size=11)
    tokens("list-uint16-lz4", pl.List(pl.UInt16), compression="lz4")
    tokens("list-uint32-gzip", pl.List(pl.UInt32), compression="gzip", data_page_size=128)
    tokens("array-int32", pl.Array(pl.Int32, LENGTH), "fixed", compression="uncompressed")
    tokens("no-rows", pl.List(pl.Int32), "none")

    def write(path, column, rows, kind):
        pl.DataFrame({column: pl.Series(rows, dtype=kind)}).write_parquet(path)

    path = folder.refused("polars-null-token.parquet", "tokens", "input_ids", "row group 0, row 5", "holds a null token")
    write(path, "input_ids", WITH_NULL_TOKEN, pl.List(pl.Int32))
    for name, kind in (("text", pl.String), ("text-categorical", pl.Categorical)):
        write(folder.holds(f"polars-{name}.parquet", "text", "content"), "content", text(DOCUMENTS), kind)
    path = folder.refused("polars-text-null.parquet", "text", "content", "row group 0, row 5", "the text is null")
    write(path, "content", text(WITH_NULL_ROW), pl.String)


def main():
    folder = Folder(pathlib.Path(sys.argv[1]) / "tests/golden/parquet")
    for write in (pyarrow_tokens, pyarrow_text, huggingface, duck, polars):
        write(folder)
    expected = {
        "made_by": {name: module.__version__ for name, module in
                    (("pyarrow", pa), ("datasets", datasets), ("duckdb", duckdb), ("polars", pl))},
        "contents": {"documents": DOCUMENTS, "fixed": FIXED, "none": []},
        "files": folder.files,
    }
    (folder.path / "expected.json").write_text(compact(expected) + "\n")
    print(f"{len(folder.files)} files in {folder.path}")


def compact(expected):
    """JSON with an entry a line."""
    def block(entries):
        return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items()) + "\n}"

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {block(value)}" for key, value in expected.items()) + "\n}"


if __name__ == "__main__":
    main()
