"""Sets of shards that somebody has put on the hub: downloaded, checked, and described like our own."""

import functools
import re
from pathlib import Path

from data import DataError, files
from data.files import folder_lock
from data.identity import lost, read_through
from data.meta import new_meta, read_meta, totals, write_meta
from data.progress import say
from data.shards import open_shard
from data.sources import retrying


def fetch(repo: str, out_dir: Path, tokenizer, max_shards: int | None, retries: int) -> dict:
    """Download a hub data set of ready shards, all or `max_shards` for training, checking each; returns the meta."""
    with folder_lock(out_dir):
        made = {"source": {"pretokenized": repo}, "max_shards": max_shards}
        old = read_meta(out_dir) or {"made": made}
        if old.get("made", {}).get("source") != made["source"]:
            raise DataError(f"{out_dir} holds another set already: take another --out-dir")
        records = old.get("shards", [])
        gone = lost(out_dir, records)
        known = {record["file"]: record for k, record in enumerate(records) if k not in gone}
        if old.get("complete") and old["made"] == made and not gone:
            say(f"already complete, nothing to do: {len(known)} shards in {out_dir}")
            return old
        remote = retrying(lambda: remote_files(repo), min(retries, 2))
        shards = [m for name in sorted(remote) if (m := re.fullmatch(r"\w*_(val|train)_\d+\.bin", name))]
        val, train = ([m[0] for m in shards if m[1] == split] for split in ("val", "train"))
        if not val or not train:
            raise DataError(f"the data set {repo} has no *_val_*.bin and *_train_*.bin shards")
        wanted = val + train[:max_shards]
        meta = new_meta(repo.rpartition("/")[2], tokenizer, complete=False, made=made, shards=[])
        tokenizer.save(out_dir)
        for number, name in enumerate(wanted, 1):
            record = known.get(name)
            if record is None:
                say(f"{number} of {len(wanted)}: {name}")
                one = functools.partial(fetch_one, repo, name, remote[name], out_dir, tokenizer)
                record = retrying(one, retries)
            meta["shards"].append(record)
            meta |= {"dtype": open_shard(out_dir / name).dtype.name, **totals(meta["shards"])}
            meta["complete"] = number == len(wanted)
            # fewer records never replace more while old shards are only looked through
            if name not in known or meta["complete"]:
                write_meta(out_dir, meta)
        say(f"{len(wanted)} shards, {meta['tokens']['train']:,} training tokens in {out_dir}")
        return meta


def remote_files(repo: str) -> dict[str, str | None]:
    """Names of a hub data set's files, with their SHA-256 where the hub knows it."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_tree(repo, repo_type="dataset")
    return {file.path: file.lfs.sha256 if file.lfs else None for file in files if hasattr(file, "lfs")}


def download(repo: str, name: str, folder: Path) -> None:
    """Bring one file of a hub data set into a folder; it appears there only when whole, and resumes."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(repo, name, repo_type="dataset", local_dir=folder)


def fetch_one(repo: str, name: str, sha256: str | None, folder: Path, tokenizer) -> dict:
    """Download one shard unless the right one is there already; its record for meta.json."""
    path = folder / name
    if not (path.is_file() and sha256 and files.sha256(path) == sha256):
        download(repo, name, folder)
    try:
        content, documents = read_through(path, tokenizer.eot)
        if sha256 and content.sha256 != sha256:
            raise DataError(f"{path} differs from the hub's copy")
    except DataError as error:
        path.unlink()
        raise OSError(str(error)) from error  # the next attempt downloads it again
    if content.highest >= tokenizer.n_vocab:
        raise DataError(f"{name} has {content.top()}: name the tokenizer that has it with --tokenizer")
    counts = {"tokens": content.tokens, "documents": documents}
    return {"file": name, "split": "val" if "_val_" in name else "train", **counts, "sha256": content.sha256}
