"""Sets of shards that somebody has put on the hub: downloaded, checked, and described like our own."""

import functools
import itertools
import re
import time
from pathlib import Path

from data import DataError, files
from data.files import folder_lock
from data.identity import read_through
from data.meta import new_meta, read_meta, totals, write_meta
from data.pipeline import is_whole
from data.shards import find_shards, open_shard
from data.sources import wait_or_give_up

say = functools.partial(print, flush=True)


def fetch(repo: str, out_dir: Path, tokenizer, max_shards: int | None, retries: int) -> dict:
    """Download a hub data set of ready shards, all or `max_shards` for training, checking each; returns the meta."""
    with folder_lock(out_dir):
        old = read_meta(out_dir)
        if old is not None and old.get("made", {}).get("source") != {"pretokenized": repo}:
            raise DataError(f"{out_dir} holds another set already: take another --out-dir")
        if old is None and (find_shards(out_dir, "train") or find_shards(out_dir, "val")):
            say(f"{out_dir} has shards without meta.json; each is checked against the hub's checksum")
        known = {record["file"]: record for record in (old or {}).get("shards", []) if "documents" in record}
        same = old is not None and old.get("complete") and old["made"].get("max_shards") == max_shards
        if same and all(is_whole(out_dir, record) for name, record in known.items()):
            say(f"already complete, nothing to do: {len(known)} shards in {out_dir}")
            return old
        remote = _retrying(lambda: remote_files(repo), min(retries, 2))
        wanted = sorted(name for name in remote if re.fullmatch(r"\w*_val_\d+\.bin", name))
        train = sorted(name for name in remote if re.fullmatch(r"\w*_train_\d+\.bin", name))
        if not wanted or not train:
            raise DataError(f"the data set {repo} has no *_val_*.bin and *_train_*.bin shards")
        wanted += train[:max_shards]
        made = {"source": {"pretokenized": repo}, "max_shards": max_shards}
        meta = new_meta(repo.rpartition("/")[2], tokenizer, complete=False, made=made, shards=[])
        tokenizer.save(out_dir)
        for number, name in enumerate(wanted):
            record = known.get(name)
            if record is None or not is_whole(out_dir, record):
                say(f"{number + 1} of {len(wanted)}: {name}")
                record = _retrying(
                    lambda name=name: fetch_one(repo, name, remote[name], out_dir, tokenizer), retries
                )
            meta["shards"].append(record)
            meta |= {"dtype": open_shard(out_dir / name).dtype.name, **totals(meta["shards"])}
            meta["complete"] = number + 1 == len(wanted)
            # fewer records never replace more while old shards are only looked through
            if record is not known.get(name) or meta["complete"]:
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
    except DataError:
        path.unlink()  # so that the next attempt downloads it again
        raise
    if content.highest >= tokenizer.n_vocab:
        raise ValueError(
            f"{name} has the token id {content.highest}, which {tokenizer.name} lacks: name the right one with "
            f"--tokenizer"
        )
    return {
        "file": name,
        "split": "val" if "_val_" in name else "train",
        "tokens": content.tokens,
        "documents": documents,
        "sha256": content.sha256,
    }


def _retrying(action, retries: int, wait=time.sleep):
    """Call until it succeeds, with longer and longer waits; after `retries` failures in a row a DataError."""
    for failures in itertools.count(1):
        try:
            return action()
        except Exception as error:  # of httpx, requests, huggingface_hub, the operating system
            if type(error) is ValueError:  # not of a kind of its own: `fetch_one`'s
                raise DataError(str(error)) from error
            wait_or_give_up(error, failures, retries, wait)
