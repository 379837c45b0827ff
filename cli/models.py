"""``speechtok models``."""

from .common import Json, print_table, write_json


def models(json_file: Json = None) -> None:
    """List the tokenizers that have a name."""
    from speechtok.registry import describe_all

    rows = describe_all()
    write_json(json_file, rows)
    columns = [
        "name",
        "encoder",
        "layer",
        "rate",
        "codebooks",
        "vocab_size",
        "bitrate",
        "megabytes",
        "licence",
        "status",
        "revision",
    ]
    titles = [
        "name",
        "encoder",
        "layer",
        "units/s",
        "books",
        "vocabulary",
        "bit/s",
        "MB",
        "licence",
        "status",
        "revision",
    ]
    print_table("Tokenizers", titles, [["-" if row[c] is None else row[c] for c in columns] for row in rows])
