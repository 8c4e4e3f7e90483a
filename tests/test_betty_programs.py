"""Programs in Betty's own ways of writing, on real data: rename the imports and they run, and do what they are for.

Each program in tests/betty is a script with `from betty...` imports and hooks as Betty's examples use them; here `betty` is renamed to `betty_nb` and
the script is run. `pytest -s` prints the figures."""

import ast
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_diabetes, load_wine

from betty_nb.configs import Config, EngineConfig
from betty_nb.engine import Engine
from betty_nb.envs import Env
from betty_nb.graph import GraphError, GraphWarning
from betty_nb.problems import HigherIterativeProblem, ImplicitProblem, IterativeProblem
from tests.repo import directives, name, notebooks, read, source

BETTY = Path(__file__).parent / "betty"


def renamed(source):
    "A Betty program with its imports renamed, and nothing else"
    return re.sub(r"^(from|import) betty\b", r"\1 betty_nb", source, flags=re.M)


@pytest.fixture
def run(monkeypatch, tmp_path):
    "run(name, *arguments): the variables of the program after it has run, in a folder of its own"

    def run(name, *arguments, warned=()):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        variables = {"__name__": "__main__", "__file__": str(BETTY / f"{name}.py")}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", GraphWarning)
            exec(compile(renamed((BETTY / f"{name}.py").read_text(encoding="utf-8")), name, "exec"), variables)
        graph_warnings = [str(w.message) for w in caught if issubclass(w.category, GraphWarning)]
        assert len(graph_warnings) == len(warned) and all(map(re.search, warned, graph_warnings)), graph_warnings
        return variables

    return run


@pytest.fixture(scope="module")
def baselines():
    "What programs reach without an upper level, kept for the tests that share it"
    return {}


# --- the programs


@pytest.mark.parametrize("method", ["darts", "cg", "neumann", "itd"])
def test_logistic_regression_hpo(run, baselines, method):
    if "hpo" not in baselines:
        baselines["hpo"] = run("logistic_regression_hpo", "--meta_lr", "0")["result"]
    before = baselines["hpo"]
    program = run("logistic_regression_hpo", "--type", method)
    after = program["result"]
    print(
        f"\n{method}: validation loss {before['loss']:.3f} -> {after['loss']:.3f}, test loss {before['test_loss']:.3f} -> {after['test_loss']:.3f}"
    )
    assert after["loss"] < before["loss"] - 0.1 and after["test_loss"] < before["test_loss"] - 0.1
    strengths = program["parent"].module.w
    assert strengths.min() >= 1e-8 and strengths.max() <= 1.0  # param_callback
    assert program["engine"].outer.optimizer.param_groups[0]["lr"] < 1.0  # configure_scheduler


@pytest.mark.parametrize("option", [(), ("--rollback",)], ids=["plain", "roll_back"])
def test_learning_to_reweight(run, baselines, option):
    if "reweight" not in baselines:
        nothing_above = [r"on level 'outer' has no effect", r"on level 'inner' has no effect"]
        baselines["reweight"] = run("learning_to_reweight", "--baseline", warned=nothing_above)["best_acc"]
    baseline = baselines["reweight"]
    program = run("learning_to_reweight", *option, warned=[r"Config\(type='darts'\) on level 'outer' has no effect.*set it on 'inner'"])
    kept = program["kept"]
    print(
        f"\n60 % of the labels drawn at random: test accuracy {baseline:.1f} % -> {program['best_acc']:.1f} %; "
        f"mean weight of clean labels {kept['clean']:.2f}, of wrong ones {kept['noisy']:.2f}"
    )
    assert program["best_acc"] > baseline + 2
    assert kept["clean"] > kept["noisy"] + 0.3
    saved = torch.load("best.pt", weights_only=True)
    assert saved.keys() >= {"module", "optimizer", "scheduler"}  # what validation kept: the state of the best network


def test_implicit_maml(run):
    program = run("implicit_maml")
    result = program["result"]
    print(f"\n5-way 2-shot on unseen classes: {result['before']:.1f} % -> {result['after']:.1f} %")
    assert result["after"] > result["before"] + 10
    assert program["outer"].count == program["args"].iters // program["args"].inner_steps


def test_architecture_search(run):
    result = run("train_search")["result"]
    alone = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in result["alone"].items())
    print(f"\ngenotype {', '.join(result['genotype'])}, weight {result['share']:.2f}; test accuracy of each operation: {alone}")
    best = max(result["alone"], key=result["alone"].get)
    assert result["genotype"] == [best] and result["share"] > 0.6


def test_learning_by_ignoring(run):
    plain = run("learning_by_ignoring", "--meta_lr", "0")["result"]
    program = run("learning_by_ignoring")
    result, kept = program["result"], program["kept"]
    print(
        f"\ntest accuracy {plain['acc']:.3f} -> {result['acc']:.3f}; mean weight of source images of the same domain "
        f"{kept['same domain']:.2f}, of the other {kept['other domain']:.2f}"
    )
    assert [[p.name for p in path] for path in program["reweight"].paths] == [["reweight", "pretrain", "finetune", "reweight"]]
    assert result["acc"] > plain["acc"] + 0.04 and result["loss"] < plain["loss"] - 0.1
    assert kept["same domain"] > kept["other domain"] + 0.2


def test_ppo(run):
    program = run("ppo")
    print(f"\nmean return of an episode of CartPole-v1, by epoch: {program['result']}")
    assert max(program["result"][-3:]) > program["result"][0] + 100
    assert program["env"].actor is program["actor"] and program["actor"].env is program["env"]


# --- iterative and implicit levels in one engine


def ridge_data(loader=load_diabetes, n=60):
    torch.manual_seed(0)
    x, y = (torch.tensor(part).float() for part in loader(return_X_y=True))
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return (x[:n], y[:n]), (x[n:], y[n:])


def test_iterative_and_implicit_levels_in_one_engine():
    train, valid = ridge_data()

    class Fast(HigherIterativeProblem):
        def training_step(self, batch):
            x, y = batch
            return (self.module(x)[:, 0] - y).square().mean() + self.penalty(self.module.weight)

        def on_inner_loop_start(self):
            self.module.weight.data.zero_()

    class Slow(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return (self.module(x)[:, 0] - y).abs().add(1e-3).square().mean() + self.penalty(self.module.weight)

    class Penalty(ImplicitProblem):
        def forward(self, weight):
            return (self.module.bias.exp() * weight.square()).sum()

        def training_step(self, batch):
            x, y = batch
            return sum((level(x)[:, 0] - y).square().mean() for level in (self.fast, self.slow))

    assert issubclass(Fast, IterativeProblem)

    def trained(lr):
        torch.manual_seed(0)
        modules = [torch.nn.Linear(10, 1, bias=False), torch.nn.Linear(10, 1, bias=False), torch.nn.Linear(1, 10)]
        torch.nn.init.zeros_(modules[2].bias)
        fast = Fast(
            "fast", Config(unroll_steps=10), modules[0], torch.optim.SGD(modules[0].parameters(), lr=0.05), train_data_loader=[train]
        )
        slow_config = Config(type="cg", cg_iterations=10, unroll_steps=10)
        slow = Slow("slow", slow_config, modules[1], torch.optim.SGD(modules[1].parameters(), lr=0.05), train_data_loader=[train])
        penalty = Penalty("penalty", Config(), modules[2], torch.optim.Adam([modules[2].bias], lr=lr), train_data_loader=[valid])
        dependencies = {"u2l": {penalty: [fast, slow]}, "l2u": {fast: [penalty], slow: [penalty]}}
        engine = Engine([penalty, fast, slow], EngineConfig(train_iters=200, strategy="cpu"), dependencies)
        engine.run()
        with torch.no_grad():
            return engine, penalty.training_step(valid).item()

    before = trained(0.0)[1]
    engine, after = trained(0.2)
    print(f"\nvalidation loss of both levels together {before:.3f} -> {after:.3f}")
    assert after < before - 0.1
    assert engine.penalty.steps == 20 and engine.fast.kind == "iterative" and engine.slow.kind == "implicit"


# --- early names, and everything that is set on a live program


def test_early_names_and_the_ways_to_set_things(tmp_path):
    "`Config(steps=5)`, self.cfg, self.env, problems as keys, set_*, set_dependency, patch_*, train_step, problem.step()"
    torch.manual_seed(0)
    x, y = load_wine(return_X_y=True)
    order = torch.randperm(len(x))
    x, y = torch.tensor(x).float()[order], torch.tensor(y)[order]
    x = (x - x.mean(0)) / x.std(0)

    class Lab(Env):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.frozen = torch.nn.Linear(13, 13)

        def step(self):
            return self.get_batch()

        def reset(self):
            self.frozen = self.patch_module(self.frozen)

    class Upper(ImplicitProblem):
        def training_step(self, batch):
            inputs, targets = batch
            out = self.lower(inputs)
            return {"loss": torch.nn.functional.cross_entropy(out, targets), "acc": (out.argmax(1) == targets).float().mean()}

        def param_callback(self, parameters):  # Betty has passed the parameters, and has not
            for p in parameters:
                p.data.clamp_(-5, 1)

    class Lower(ImplicitProblem):
        def training_step(self, batch):
            inputs, targets = batch
            decay = (self.upper.module.bias.exp() * self.module.weight.square()).sum()
            return torch.nn.functional.cross_entropy(self.module(inputs), targets) + self.cfg["scale"] * decay

        def get_batch(self):
            return self.env.step()

    class Program(Engine):
        def train_step(self):
            self.lower.step(global_step=self.global_step)

        def validation(self):
            return {"loss": self.upper.training_step((x[80:], y[80:]))["loss"].item()}

    modules = torch.nn.Linear(1, 13), torch.nn.Linear(13, 3)
    upper = Upper(name="upper", config=Config(log_step=2), module=modules[0], optimizer=torch.optim.Adam([modules[0].bias], lr=0.3))
    upper.set_train_data_loader([(x[40:80], y[40:80])])
    lower = Lower(name="lower", config=Config(type="darts", steps=5, first_order=True, retain_graph=True), extra_config={"scale": 0.5})
    lower.set_module(modules[1])
    lower.set_optimizer(torch.optim.SGD(modules[1].parameters(), lr=0.2))
    lower.set_scheduler(torch.optim.lr_scheduler.StepLR(lower.optimizer, 100))
    env = Lab(train_data_loader=[(x[:40], y[:40])])
    # As Betty's software design has it: keys and values are problems. A program starts without edges here, and gets them while it lives.
    with pytest.warns(GraphWarning, match="on level 'lower' has no effect"):
        engine = Program(problems=[upper, lower], config=EngineConfig(train_iters=100, valid_step=50), dependencies={}, env=env)
    assert engine.leaves == [upper, lower]
    engine.set_dependency({"u2l": {upper: [lower]}, "l2u": {lower: [upper]}})
    assert engine.leaves == [lower] and lower.leaf and lower.parents == [upper] and upper.children == [lower]
    env.reset()
    before = engine.validation()["loss"]
    engine.run()
    after = engine.validation()["loss"]
    print(f"\nvalidation loss {before:.3f} -> {after:.3f}")
    assert after < before - 0.3
    assert lower.config.unroll_steps == 5 and (lower.count, upper.count) == (100, 20)
    assert upper.module.bias.max() <= 1 and env.lower is lower and lower.env is env
    state = lower.state_dict()
    weight = lower.module.weight.detach().clone()
    lower.step()
    assert lower.count == 101 and not torch.equal(lower.module.weight, weight)
    lower.load_state_dict({**state, "module": {"weight": weight, "bias": lower.module.bias.detach()}})
    assert torch.equal(lower.module.weight, weight)


def test_the_dependencies_of_bettys_software_design_are_answered():
    "Its example gives the l2u edge the same direction as the u2l edge; in Betty it stops with a bare assertion"
    levels = [
        cls(name, module=torch.nn.Linear(1, 1), optimizer=None) for name, cls in (("prob1", ImplicitProblem), ("prob2", ImplicitProblem))
    ]
    p1, p2 = levels
    with pytest.raises(GraphError, match=r"'prob1' -> 'prob2' has no l2u way back.*add l2u=\{'prob2': \['prob1'\]\}"):
        Engine(levels, dependencies={"u2l": {p1: [p2]}, "l2u": {p1: [p2]}})


# --- documents


def documents():
    "The notebooks from which programs are copied: those that export nothing and build an engine (the README is one of them, the index)"
    cells = {path: read(path)["cells"] for path in notebooks() if path.parent.name != "benchmarks"}
    exporting = {path for path in cells if any(d[0] == "default_exp" for cell in cells[path] for d in directives(cell))}
    return [
        path
        for path in cells
        if path not in exporting and any("Engine(" in source(cell) for cell in cells[path] if cell["cell_type"] == "code")
    ]


class Shortened(ast.NodeTransformer):
    "Runs of a few iterations and no assertions about their results: what counts here is what is said when an engine is built"

    def visit_Assert(self, node):
        return ast.copy_location(ast.Pass(), node)

    def visit_keyword(self, node):
        if node.arg == "train_iters":
            node.value = ast.copy_location(ast.Constant(20), node.value)
        return self.generic_visit(node)


def misplaced(cells):
    "What the graph of a document's programs is warned about where the document does not catch it itself"
    variables, said = {"__name__": "__main__"}, []
    dtype = torch.get_default_dtype()
    try:
        for cell in cells:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                tree = ast.fix_missing_locations(Shortened().visit(ast.parse(cell)))
                exec(compile(tree, "document", "exec"), variables)
            said += [str(w.message) for w in caught if issubclass(w.category, GraphWarning)]
    finally:
        torch.set_default_dtype(dtype)
    return said


@pytest.mark.parametrize("document", documents(), ids=name)
def test_defect_16_no_document_sets_a_method_where_it_has_no_effect(document):
    "That documents run at all is seen in test_notebooks.py"
    assert misplaced([source(cell) for cell in read(document)["cells"] if cell["cell_type"] == "code"]) == []


def test_defect_16_a_misplaced_method_in_a_document_is_found():
    path = next(path for path in documents() if path.stem == "index")
    cells = [source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    wrong = [cell.replace('Outer("outer", module=', 'Outer("outer", Config(type="cg"), module=') for cell in cells]
    assert wrong != cells
    assert [re.sub(r"^.*on level '(\w+)' has no effect.*set it on '(\w+)'.*$", r"\1 \2", said) for said in misplaced(wrong)] == [
        "outer inner"
    ]
