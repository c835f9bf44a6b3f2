"""The verdict and the tables of the paper, cell by cell, out of runs whose numbers were chosen by hand."""

import pytest

from evidence import tables
from evidence.report import read_runs
from test_report import full, put, result


def cycle(number, acc, cr, **more):
    return {"cycle": number, "acc": acc, "drop": 87.0 - acc, "cr": cr, **more}


CYCLES = [cycle(0, 87.0, 1.0), cycle(1, 80.0, 6.25, surrogate_prediction=70.5),
          cycle(2, 84.0, 6.75, surrogate_prediction=85.25)]
MORE = {"cycles": CYCLES, "best_cycle": 2, "strategies": {"auto": 0.5, "pruning": 0.5}, "sensitivity": [1.0, 0.5],
        "kernels": {f"k{i}": {"block": "first"} for i in range(8)}, "surrogate_mae": 5.375, "searches": [
            {"level": "HLA", "cycle": 1, "entropy": [0.9, 0.8]},
            {"level": "LLA", "cycle": 1, "entropy": [1.0, 0.75], "consensus_drop": 4.0, "random_drop": 5.0},
            {"level": "LLA", "cycle": 2, "entropy": [0.75, 0.5], "consensus_drop": 3.0, "random_drop": 6.0}]}
NULL = {"search.method": "null"}
AGAIN = {"baseline_bn_acc_full": 86.5, "deployed_bn_drop_full": 2.48, "deployed_bn_drop_interval_full": [1.9, 3.1]}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Experiment 1 on two seeds with four ablations, experiment 4 as a miniature without a null run, and a user's."""
    out = tmp_path_factory.mktemp("runs")
    for seed, acc, cr in ((42, 85.0, 6.5), (43, 83.0, 7.5)):
        common = {**MORE, "seed": seed, "baseline_acc": 87.0}
        put(out, f"exp1-seed{seed}", full(**common, final_acc=acc, drop=87 - acc, cr=cr, deployed_acc_full=acc - 1))
        put(out, f"exp1-guess-seed{seed}", full(**common, name="guess", final_acc=acc - 4, drop=91 - acc, cr=6.0,
                                                deployed_acc_full=acc - 1.25), {"sensitivity.method": "none"})
    put(out, "exp1-x-seed42", result(**MORE, name="x", final_acc=70.0, drop=17.0, cr=9.25), {"search.method": "no-hla"})
    put(out, "exp1-y-seed42", result(**{**MORE, "cycles": [cycle(1, 79.0, 6.125)]}, name="y"),
        {"lla.algorithms": "A2C,A2C,A2C"})
    put(out, "exp1-z-seed42", full(**MORE, name="z", cr=6.625, deployed_acc_full=83.5, packed_bytes=20_170_450), NULL)
    put(out, "exp1-z-seed7", result(**MORE, name="z", seed=7, cr=50.0), NULL)
    put(out, "exp1-null-seed99", result(**MORE, name="null", seed=99, cr=99.0), NULL | {"carry": "rest"})
    put(out, "exp4-seed42", result(**MORE, exp=4, model="resnet18", smoke=True))
    put(out, "mine", full(**AGAIN, exp=0, name="mine", cr=9.0))
    return {table.key: table for table in tables.all_tables(read_runs(out))}


def lines(table):
    return [dict(zip(table.columns, row)) for row in table.rows]


def of(out, **changes):
    put(out, "run", full(**changes))
    return {table.key: table for table in tables.all_tables(read_runs(out))}


# The verdict


def test_the_verdict_has_a_row_per_experiment_with_bytes_whose_quotient_is_the_ratio(read):
    mine, first, fourth = lines(read["verdict"])
    assert next(iter(read)) == "verdict"
    assert [row["exp"] for row in (mine, first, fourth)] == ["mine", "1", "4"]
    assert (first["seeds"], first["baseline"], first["packed file"]) == ("42, 43", "87.01 ± 0.00", "83.00 ± 1.41")
    assert (first["FP32 KB"], first["packed KB"], first["ratio"]) == ("87654.3", "16136.4 ± 0.0", "5.43 ± 0.00")
    assert fourth["network, data"] == "resnet18, cifar100 (miniature)" and "miniature" not in first["network, data"]


def test_the_verdict_compares_with_the_null_run_or_the_drawn_configurations(read):
    mine, first, fourth = (row["against the null controller"] for row in lines(read["verdict"]))
    # 84.0 - 83.5, both with the interval [83.29, 84.72]: hypot(0.71, 1.22) to the left, hypot(0.72, 0.21) to the right
    assert first == ("No difference in accuracy shown: accuracy +0.50 [-0.91, +1.25] points against null; packed file "
                     "20.0% smaller than null's")
    assert fourth == ("CR like null's: 6.54 against 6.70 ± 0.21, drawn; accuracy not compared (no run with "
                      "search=null)")
    assert mine.startswith("Higher CR than null: 9.00 against 6.70 ± 0.21")  # more than two standard deviations


@pytest.mark.parametrize("accuracies, word", [((80.0, 80.5), "More accurate"), ((90.0, 91.0), "Less accurate"),
                                              ((80.0, 91.0), "No difference in accuracy shown")])
def test_several_seeds_decide_where_all_agree(tmp_path, accuracies, word):
    for seed, null in zip((1, 2), accuracies):
        put(tmp_path, f"a{seed}", full(seed=seed))
        put(tmp_path, f"n{seed}", full(seed=seed, name="n", deployed_acc_full=null), NULL)
    row, = lines(tables.verdict_table(tables.families(read_runs(tmp_path))))
    assert row["against the null controller"].startswith(word + ": accuracy ")


def test_a_null_controller_alone_is_said_to_be_one(tmp_path):
    put(tmp_path, "n", full(name="n"), NULL)
    row, = lines(tables.verdict_table(tables.families(read_runs(tmp_path))))
    assert (row["exp"], row["against the null controller"]) == ("1-n", "is the null controller")


# Like with like


def test_the_packed_file_is_compared_with_a_baseline_treated_in_the_same_way(tmp_path):
    known = of(tmp_path, **AGAIN, drop_full=1.81, drop_interval_full=[1.25, 2.37], mcnemar_p_full=0.00123,
               grid_acc_full=84.5, grid_interval_full=[83.2, 84.9], grid_drop_full=2.51,
               grid_drop_interval_full=[2.0, 3.0], deployed_drop_full=2.99)
    row, = lines(known["verdict"])
    assert (row["baseline"], row["drop"]) == ("87.01; BN again 86.50", "2.48 [1.90, 3.10]")
    assert known["whole"].rows[0][5:] == [
        "87.01 [86.34, 87.65]", "85.20", "1.81 [1.25, 2.37], p = 0.0012", "84.50", "2.51 [2.00, 3.00]", "86.50",
        "84.02", "2.48 [1.90, 3.10]"]
    assert tables.DAGGER_NOTE not in known["verdict"].notes + known["whole"].notes


def test_a_drop_that_earlier_code_measured_has_a_dagger_and_its_note(tmp_path):
    known = of(tmp_path, deployed_drop_interval_full=[2.4, 3.6])
    assert lines(known["verdict"])[0]["drop"] == known["whole"].rows[0][-1] == "2.99 [2.40, 3.60] †"
    assert all(known[key].notes[-1] == tables.DAGGER_NOTE for key in ("verdict", "whole"))
    assert tables.DAGGER_NOTE not in known["table2"].notes


def test_a_subset_s_drop_of_the_packed_file_has_a_dagger(read):
    assert lines(read["verdict"])[2]["drop"] == "2.81 †"  # 87.1094 - 84.2969


# The paper's tables


def test_table_2_has_paper_measured_and_null_and_no_experiment_that_was_not_run(read):
    rows = lines(read["table2"])
    assert {row["exp"] for row in rows} == {"1", "4"}
    paper, seeds, here, null = [row for row in rows if row["exp"] == "1"]
    assert [paper[k] for k in ("baseline", "final", "drop", "CR", "MSR %")] == [
        "86.88", "85.16", "1.72", "6.23", "83.9"]
    assert [seeds[k] for k in ("whose", "baseline", "final", "CR")] == ["paper, Table 3", "87.86", "85.65", "–"]
    # by hand: 85 and 83 have the mean 84 and the standard deviation sqrt(2); 6.5 and 7.5 sqrt(0.5)
    assert [here[k] for k in ("whose", "seeds", "baseline", "final", "drop", "CR")] == [
        "here", "42, 43", "87.00 ± 0.00", "84.00 ± 1.41", "3.00 ± 1.41", "7.00 ± 0.71"]
    # neither seed 7 nor the null controller of other settings
    assert (null["whose"], null["seeds"], null["CR"]) == ("null, run", "42", "6.62")
    fourth = [row for row in rows if row["exp"] == "4"]
    assert [row["whose"] for row in fourth] == ["paper", "here (miniature)", "null, drawn (miniature)"]
    assert fourth[2]["CR"] == "6.70 ± 0.21" and fourth[2]["final"] == "–"


def test_runs_with_other_settings_are_not_averaged(tmp_path):
    put(tmp_path, "a", result(seed=1, cr=4.0))
    put(tmp_path, "b", result(seed=2, cr=6.0))
    put(tmp_path, "c", result(seed=3, cr=8.0), {"search.cycles": 2})
    rows = lines(tables.table2(tables.families(read_runs(tmp_path))))
    assert [(r["seeds"], r["CR"]) for r in rows if r["whose"] == "here"] == [("1, 2", "5.00 ± 1.41"), ("3", "8.00")]


def test_table_4_has_strategies_surrogate_and_compliance(read):
    paper, here, *_ = lines(read["table4"])
    assert paper["strategies of the blocks, %"] == "auto 75.0, pruning 16.7, quantization 8.3"
    assert (paper["surrogate MAE"], paper["compliance %"]) == ("3.57", "59.8")
    assert here["strategies of the blocks, %"] == "auto 50.0, pruning 50.0" and here["kernels"] == "8"
    assert (here["blocks"], here["surrogate MAE"], here["compliance %"]) == ("2", "5.38 ± 0.00", "61.2 ± 0.0")
    assert [row["compliance %"] for row in lines(read["table4"]) if row["whose"] == "null, drawn (miniature)"] == [
        "61.0 ± 2.1"]


def test_table_5_knows_ablations_by_their_settings(read):
    assert [(row[1], *row[3:]) for row in read["table5"].rows] == [
        ("HiReLC: HLA and LLA ensemble", "42, 43", "3.00 ± 1.41", "7.00 ± 0.71", "1.72", "6.23"),
        ("no HLA, uniform budgets", "42", "17.00", "9.25", "6.80", "8.87"),
        ("[PPO, A2C, PPO], first cycle", "42, 43", "7.00 ± 0.00", "6.25 ± 0.00", "3.28", "6.38"),
        ("[A2C, A2C, A2C], first cycle", "42", "8.00", "6.12", "7.19", "6.63"),
        ("null, run", "42", "1.64", "6.62", "–", "–")]


def test_variants_are_compared_with_the_experiment_by_seed(read):
    rows = {row["name"]: row for row in lines(read["variants"])}
    last = read["variants"].columns[-1]
    assert rows["–"]["what differs"] == "the experiment itself"
    assert rows["guess"]["what differs"] == "sensitivity.method=none"
    assert rows["guess"][last] == "-0.25 ± 0.00 (packed, whole split)" and rows["x"][last] == "+0.00 (packed)"
    assert rows["y"]["what differs"] == "lla.algorithms=A2C,A2C,A2C"
    assert (rows["null"]["what differs"], rows["null"][last]) == ("carry=rest search.method=null", "–")


def test_the_agents_are_compared_with_random_actions_and_the_null_controller(read):
    row = next(row for row in read["moved"].rows if row[0] == "4")
    assert row[4:] == ["0.8750 ± 0.1768 → 0.6250 ± 0.1768", "3.50 ± 0.71", "5.50 ± 0.71", "-2.00 ± 1.41", "6.54",
                       "6.70 ± 0.21", "61.2", "61.0 ± 2.1"]


def test_tables_without_runs_are_absent(tmp_path):
    assert list(of(tmp_path, exp=0, final_acc_full=None)) == ["verdict"]


def test_what_was_not_measured_in_every_run_says_so():
    assert tables.spread([1.0, None, 3.0]) == "2.00 ± 1.41 (2 of 3 runs)"
    assert tables.spread([None, None]) == "–" and tables.spread([2.0]) == "2.00"
