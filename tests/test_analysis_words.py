"""scripts/analysis/words.py: the comparison fits a terminal, and says nothing that is not there."""

from runs_on_disk import load, write_demo, write_run

from scripts.analysis import numbers, words


def test_terminal_fits_110_columns(tmp_path):
    for arm in ("bpe_tied", "bpe_untied", "kronecker", "kronecker_tied"):
        for seed in range(1337, 1342):
            write_run(tmp_path, arm, seed, 4.0 + 0.01 * len(arm) + 0.0001 * seed)
    text = words.as_text(numbers.compare(load(tmp_path)))
    assert max(map(len, text.splitlines())) <= 110


def test_left_out_runs_are_named_and_one_seed_gives_no_nan(tmp_path):
    demo = write_demo(tmp_path)
    write_run(demo, "kronecker", 1340, 3.8, upto=50)
    assert "kronecker_s1340 (unfinished: iter 50 of 100)" in " ".join(
        words.as_text(numbers.compare(load(demo))).split()
    )
    for arm in ("bpe_tied", "kronecker"):
        write_run(tmp_path / "one", arm, 1, 4.0)
    assert "nan" not in words.as_text(numbers.compare(load(tmp_path / "one"))).lower()
