"""Strict loading: every preset parses, every mistake is one clear error."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mt_deepspeed.config import ConfigError, RunConfig, from_dict, load_config, preset_names, to_dict, to_yaml


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_survive_a_round_trip(name: str) -> None:
    config = load_config(name)
    assert from_dict(RunConfig, yaml.safe_load(to_yaml(config))) == config
    assert config.data.train
    assert config.train.global_batch_size % config.train.micro_batch_size == 0


def test_later_sources_win_key_by_key(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "run.yaml"
    file.write_text("train: {max_steps: 7, seed: 3}\noptim: {betas: [0.8, 0.9]}\n")
    config = load_config("quickstart", [file], ["train.seed=5", "optim.lr=1e-3", "model.link.kind=saue"])
    assert (config.train.max_steps, config.train.seed) == (7, 5)
    assert config.optim.betas == (0.8, 0.9)
    assert config.optim.lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert config.model.link.kind == "saue"
    assert config.data == load_config("quickstart").data


def test_data_sets_can_be_given_in_one_setting() -> None:
    config = load_config(None, [], ["data.train=[{path: a, weight: 2}, {path: b, splits: [train, restval]}]"])
    assert config.data.train[0].weight == 2.0
    assert config.data.train[1].splits == ("train", "restval")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.max_stepz=3", ["train.max_stepz", "did you mean `max_steps`"]),
        ("trian.max_steps=3", ["trian", "did you mean `train`"]),
        ("train.max_steps=many", ["train.max_steps", "'many'", "int"]),
        ("train.max_steps=1.5", ["train.max_steps", "1.5", "int"]),
        ("train.max_steps=true", ["train.max_steps", "True"]),
        ("optim.betas=[0.9]", ["optim.betas", "found 1", "expected 2"]),
        ("data.train=coco", ["data.train", "'coco'", "list"]),
        ("data.train=[{splits: [train]}]", ["data.train[0]", "path"]),
        ("data.train=[{path: a, split: b}]", ["data.train[0].split", "splits"]),
        ("model.link.kind=aae", ["model.link.kind", "'aae'", "'aaue'"]),
        ("model.link.noise=1", ["model.link.noise", "bool"]),
        ("model=3", ["model", "mapping"]),
        ("train.max_steps", ["KEY=VALUE"]),
        ("train.max_steps=[", ["not valid YAML"]),
        ("model.vision.image_size=50", ["image_size", "50", "48"]),
    ],
)
def test_mistakes_are_named(setting: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(None, [], [setting])
    for word in words:
        assert word in str(caught.value)


def test_unknown_preset_and_missing_or_broken_files_are_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="did you mean `managertower-base`"):
        load_config("managertower_base")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(None, [tmp_path / "nowhere.yaml"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(None, [broken])
    broken.write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(None, [broken])


@given(st.integers(0, 10**9), st.floats(0, 1, allow_nan=False), st.booleans(), st.text(max_size=20))
def test_any_value_survives_yaml(steps: int, lr: float, noise: bool, folder: str) -> None:
    config = from_dict(
        RunConfig,
        {
            "run_dir": folder,
            "train": {"max_steps": steps},
            "optim": {"lr": lr},
            "model": {"link": {"noise": noise}},
        },
    )
    assert from_dict(RunConfig, yaml.safe_load(to_yaml(config))) == config
    assert to_dict(config)["optim"]["lr"] == lr


def test_published_weights_choose_their_padding() -> None:
    own = load_config("managertower-base")
    assert (own.data.padding, own.model.mask_padding_in_managers) == ("longest", True)
    published = load_config("managertower-base", [], ["checkpoint.init_from=ManagerTower_pt_base.ckpt"])
    assert (published.data.padding, published.model.mask_padding_in_managers) == ("max_length", False)
    bridge = load_config("bridgetower-base", [], ["checkpoint.init_from=BridgeTower_pt_base.ckpt"])
    assert bridge.data.padding == "longest"
    unmasked = load_config("managertower-base", [], ["model.mask_padding_in_managers=false"])
    assert unmasked.data.padding == "max_length"
    with pytest.raises(ValueError, match=r"data\.padding=longest"):
        load_config("managertower-base", [], ["model.mask_padding_in_managers=false", "data.padding=longest"])


@pytest.mark.parametrize("kind", ["saue", "sae", "aaue_own_query", "bridge_add"])
def test_padding_that_no_manager_reads_may_have_any_length(kind: str) -> None:
    settings = [f"model.link.kind={kind}", "model.mask_padding_in_managers=false"]
    for padding in ("auto", "longest"):
        config = load_config("managertower-base", [], [*settings, f"data.padding={padding}"])
        assert not config.model.managers_read_padding
        assert config.data.padding == "longest"
