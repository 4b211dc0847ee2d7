"""Over a hundred wrong inputs to all commands: each is one line on stderr that says what to do, and exit code 2.

None of them needs a model: what can be refused without one is refused before anything is loaded.
"""

import json
import time

import numpy as np
import pytest

import eval.decode
import eval.fidelity
import eval.harness
import eval.inspect
import eval.longbench
import eval.needle
import eval.perplexity
import eval.report
import eval.speed
import train.ablate
import train.demo
import train.layerwise
from spotlight_jax.commands import chat, doctor, generate
from spotlight_jax.selector.checkpoint import save_selector
from tests.eval.tiny import make_selector
from tests.models import tiny

COMMANDS = {
    "train": train.layerwise,
    "demo": train.demo,
    "ablate": train.ablate,
    "generate": generate,
    "chat": chat,
    "doctor": doctor,
    "decode": eval.decode,
    "fidelity": eval.fidelity,
    "harness": eval.harness,
    "inspect": eval.inspect,
    "longbench": eval.longbench,
    "needle": eval.needle,
    "perplexity": eval.perplexity,
    "report": eval.report,
    "speed": eval.speed,
}

# The command and its flags in one line, and what its one line on stderr says among other things. In the flags, MODEL is
# a folder with a config of two layers and nothing else, SELECTOR one of random:tiny (three layers), SMALL fits MODEL.
SMALL = "--data.window 32 --ranking.queries 16 --measure.queries 16"
WRONG = [
    # flags that contradict each other, or say nothing
    ("generate --selector SELECTOR --prompt x --keep 0.5 --budget 30", "give one of them"),
    ("generate --selector SELECTOR --prompt x --min-tokens 5 --budget 30", "give one of them"),
    ("generate --prompt x --keep 0.5", "without a selector every token is read, whatever --keep says"),
    ("chat --dense-layers 3", "without a selector every token is read, whatever --dense-layers says"),
    ("generate --prompt x --top-k 5", "at temperature 0 nothing is drawn"),
    ("generate --prompt x --temperature 1e-40", "give 0 (the most probable token) or at least 1e-06"),
    ("generate --selector SELECTOR --model MODEL --prompt x --dense-layers 99", "does not fit this base model"),
    ("generate --selector SELECTOR --prompt x --budget 3000000", "give at least 1 token and at most 2000000"),
    ("generate --prompt x --compare", "--compare sets a selector beside dense reading"),
    ("train SMALL --model MODEL --measure.dense-layers 99", "the model's 2 layers count from 0 to 1"),
    ("train SMALL --model MODEL", "all 2 layers of"),
    ("train --no-hash.centre", "did you mean '--hash.no-centre'?"),
    ("generate --prompt x --json --stream", "leave out --stream"),
    ("train --cache-gib 3", "give --cache-dir"),
    (
        "perplexity --methods oracle-scores --model MODEL --selection.dense-layers 2",
        "the model's 2 layers count from 0 to 1",
    ),
    ("needle --methods oracle-scores --model MODEL --selection.dense-layers 2", "dense_layers has 2"),
    ("perplexity --keep 1.5", "above 1 it is a number of tokens: whole"),
    ("perplexity --keep inf", "keep is inf; give a finite number"),
    ("perplexity --keep 0", "keep is 0.0; give a share above 0"),
    ("inspect --settings sinks --selection.recent-tokens 5", "--settings and --selection both choose"),
    ("perplexity --methods oracle-scores --copy.passage 100", "add --copy-test"),
    ("perplexity --methods oracle-scores --window 64 --dense-prefix 64", "all of the 64 tokens"),
    ("needle --methods oracle-scores --passage 64", "--passage is of --variant copy"),
    ("needle --methods oracle-scores --depths nan", "depths is nan; give a finite number"),
    ("harness --methods oracle-scores --tasks arc_easy --fewshot -1", "fewshot is -1; give 0 examples or more"),
    ("decode --preset tiny --model MODEL", "--preset and --model both name what is timed"),
    ("decode --selector SELECTOR --code-bits 64", "--selector brings trained ones"),
    ("decode --preset tiny --dense-layers 9", "the model's 3 layers count from 0 to 2"),
    ("speed --preset tiny --dense-layers 9", "the model's 3 layers count from 0 to 2"),
    ("speed --parts ops --model-lengths 64", "--model-lengths is about part 'model', which is not timed"),
    ("report --plan nowhere.yaml", "cannot read the plan"),
    ("report --fraction 0", "fraction is 0.0"),
    ("report --fraction nan", "fraction is nan"),
    ("report --resume", "add --out FOLDER"),
    ("report --resume --out nowhere", "is no run folder"),
    ("report --plam x", "did you mean '--plan'?"),
    ("inspect --methods orakle-mass", "did you mean 'oracle-mass'"),
    ("inspect --methods oracle", "is called 'oracle-scores'"),
    ("inspect --methods window window", "each once"),
    ("inspect --methods quest@x", "only spotlight@FOLDER and spotlight+tail@FOLDER do"),
    ("inspect --methods spotlight", "add --selector FOLDER"),
    ("inspect --methods spotlight@nowhere", "is no selector"),
    ("inspect --methods dense", "dense selects nothing"),
    ("inspect --methods window --queries 0", "queries is 0"),
    ("inspect --methods window --window 8 --queries 9", "no more queries than a window has tokens"),
    ("inspect --methods window --keep 0.1 0.1", "each once"),
    ("inspect --methods window --settings bare bare", "each of --settings once"),
    ("inspect --methods window --settings bear", "Did you mean 'bare'?"),
    ("inspect --methods window --resume", "add --out RUN_FOLDER"),
    ("inspect --resume --out nowhere", "is no run folder"),
    ("inspect --methods window --model nowhere", "no such model"),
    ("inspect --methods window --model random:tinny", "did you mean"),
    ("inspect --methods window --selection.sink-tokens -1", "sink_tokens is -1"),
    ("perplexity --methods window --windows-per-text 0", "windows_per_text is 0"),
    ("perplexity --methods window --dense-prefix -1", "dense_prefix is -1"),
    ("perplexity --methods window --scores-mib 0", "scores_mib is 0"),
    ("perplexity --methods window --windw 3", "did you mean '--window'?"),
    ("perplexity --selector SELECTOR book.txt", "follows no flag"),
    ("perplexity --methods window --keep 5000000", "at most 2000000"),
    ("perplexity --methods window --dtype float8", "float8"),
    ("needle --methods window --lengths 0", "give at least 1 token"),
    ("needle --methods window --lengths 64 64", "each once"),
    ("needle --methods window --depths 2", "give numbers from 0"),
    ("needle --methods window --samples 0", "samples is 0"),
    ("needle --methods window --variant passkeys", "Did you mean 'passkey'?"),
    ("needle --methods window --variant copy --passage 8", "give at least 32 tokens"),
    ("harness --methods window", "give --tasks"),
    ("harness --methods window --tasks x --limit 0", "limit is 0"),
    ("harness --methods window --tasks x --batch 0", "batch is 0"),
    ("harness --methods window --tasks x --task-folder nowhere", "there is no folder 'nowhere'"),
    ("longbench --methods window --tasks hotpotka", "did you mean 'hotpotqa'"),
    ("longbench --methods window --limit 0", "limit is 0"),
    ("longbench --methods window --max-length 1", "max_length is 1"),
    ("longbench --methods window --e --tasks musique", "LongBench-E has no task 'musique'"),
    ("longbench score nowhere", "nowhere"),
    ("fidelity nowhere elsewhere", "nowhere"),
    ("fidelity", "required"),
    ("decode --preset tinny", "did you mean 'tiny'"),
    ("decode --methods dense dense", "each once"),
    ("decode --preset tiny --lengths 0", "must be at least 1"),
    ("decode --preset tiny --keep 2", "keep is 2.0"),
    ("decode --selector nowhere", "is no selector"),
    ("decode --model nowhere", "no such model"),
    ("speed --preset tinny", "did you mean 'tiny'"),
    ("speed --parts ops ops", "each once"),
    ("speed --rounds 0", "must be at least 1"),
    ("speed --keep 0", "keep is 0.0"),
    ("speed --resume", "add --out RUN_FOLDER"),
    ("train --steps 0", "steps is 0"),
    ("train --preset papr", "did you mean 'paper'?"),
    ("train --model nowhere", "no such model"),
    ("train --resume", "add --out RUN_FOLDER"),
    ("train --resume --out nowhere", "is no run folder"),
    ("train --data.window 1", "window must be at least 2 tokens"),
    ("train --data.held-out-windows 0", "held_out_windows is 0"),
    ("train --ranking.queries 9024", "more than the 8192 tokens of a window"),
    ("train --measure.queries 0", "give at least 1 of each"),
    ("train --measure.keep 2", "keep is 2.0"),
    ("train --steps many", "'many'"),
    ("train --stepz 3", "did you mean '--steps'?"),
    ("train --model MODEL", "is more than the 64 tokens of"),
    ("demo --stepz 3", "did you mean '--steps'?"),
    ("demo --steps 0", "steps is 0"),
    ("ablate --variants defualt", "did you mean 'default'"),
    ("ablate --resume", "add --out FOLDER"),
    ("ablate --dtype int4", "int4"),
    ("generate --prompt x --max-new-tokens 0", "max_new_tokens is 0"),
    ("generate --prompt x --temperature -1", "temperature is -1.0"),
    ("generate --prompt x --temperature nan", "temperature is nan"),
    ("generate --prompt x --temperature 1 --top-p 0", "top_p is 0.0"),
    ("generate --prompt x --temperature 1 --top-k -1", "top_k is -1"),
    ("generate --prompt x --prompt-tokens 0", "prompt_tokens is 0"),
    *(
        (f"{line} {10**30}", "give a whole number from 0 to 4294967295")
        for line in (
            *("train --seed", "train --data.seed", "ablate --seed", "chat --seed"),
            *("generate --prompt x --seed", "inspect --seed", "perplexity --seed", "needle --seed"),
            *("harness --tasks x --seed", "longbench --seed"),
        )
    ),
    ("generate --prompt x --temperature 1 --seed -1", "seed is -1"),
    (f"generate --prompt x --temperature 1 --top-k {2**31}", "top_k is 2147483648; give a whole number of at most"),
    (f"generate --prompt x --block {10**30}", "give a whole number of at most 2147483647"),
    (f"speed --parts ops --code-bits {10**30}", "give a whole number of at most 2147483647"),
    ("generate --prompt-file nowhere.txt", "no such file"),
    ("generate --prompt x y --stream", "2 prompts were given"),
    ("generate --prompt x --selector nowhere", "is no selector"),
    ("generate --prompt x --model nowhere", "no such model"),
    ("generate --prompts nowhere.jsonl", "no such file"),
    ("generate --prompts nowhere.jsonl --prompt x", "leave out --prompt and --prompt-file"),
    ("generate --prompt x --block 0", "block is 0"),
    ("generate --promt x", "did you mean '--prompt'?"),
    ("chat --model nowhere", "no such model"),
    ("chat --max-new-tokens 0", "max_new_tokens is 0"),
    ("chat --selector nowhere", "is no selector"),
    ("chat --systen x", "did you mean '--system'?"),
    ("doctor --runn", "did you mean '--run'?"),
    ("doctor --model random:tiny --tokens 0", "must be at least 1"),
    # meshes and processes that cannot be
    ("generate --prompt x --mesh modle=2", "--mesh has no axis 'modle'; give some of data, model, context"),
    ("chat --mesh model", "names no number of devices"),
    ("perplexity --methods oracle-scores --mesh model=2,model=2", "names axis 'model' twice"),
    ("perplexity --methods oracle-scores --model MODEL --mesh model=4096", "is 4096 devices, and there are"),
    ("speed --parts model --preset tiny --mesh data=4096", "is 4096 devices, and there are"),
    ("speed --parts ops --mesh model=2", "--mesh is about part 'model'"),
    ("decode --preset tiny --mesh model=4096", "is 4096 devices, and there are"),
    ("train SMALL --model MODEL --distributed.process-id 1", "needs all of coordinator, num-processes and process-id"),
    ("train SMALL --distributed.coordinator a --distributed.num-processes 2 --distributed.process-id 0", "HOST:PORT"),
    ("train SMALL --distributed.coordinator a:1 --distributed.num-processes 2 --distributed.process-id 1", "add --out"),
    ("doctor x", "follows no flag"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the table's words in capitals stand for."""
    folder = tmp_path_factory.mktemp("wrong")
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(tiny.CASES["llama3"]))
    save_selector(folder / "selector", make_selector(), "card")
    np.save(folder / "ids.npy", np.arange(500, dtype=np.uint16) % 50)
    return {"MODEL": str(model), "SELECTOR": str(folder / "selector"), "IDS": str(folder / "ids.npy")}


@pytest.mark.parametrize(("line", "told"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_input_is_one_line_and_exit_code_2_at_once(line, told, places, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *args = (places.get(word, word) for word in line.replace("SMALL", SMALL).split())
    started = time.process_time()  # whatever else the machine does
    code = COMMANDS[name].command(args)
    seconds = time.process_time() - started
    out, err = capsys.readouterr()
    assert code == 2 and err.count("\n") == 1 and told in err, (code, out, err)
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    assert seconds < 2, f"{seconds:.1f} s"
