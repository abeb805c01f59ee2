"""Reviews in files of each format."""

from __future__ import annotations

import csv
import json
from pathlib import Path

HEADER = ("text", "label")


def write(path: Path, records: list[tuple[object, ...]], header: tuple[str, ...] = HEADER) -> Path:
    """Write records in the format that the path's ending names."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([header, *records])
    elif path.suffix == ".tsv":
        rows = [header, *records]
        path.write_text("".join("\t".join(str(v).replace("\t", " ") for v in row) + "\n" for row in rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in records))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: [row[i] for row in records] for i, name in enumerate(header)}
        pq.write_table(pa.table(columns), path)
    return path
