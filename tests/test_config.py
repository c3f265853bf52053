"""Configuration: file, environment, defaults, and every way to get it wrong."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

import felhom_agent
from felhom_agent import (
    MAX_POLL_SECONDS,
    MIN_POLL_SECONDS,
    CloudflaredConfig,
    Config,
    ConfigError,
    HubConfig,
    ProxmoxConfig,
    load_config,
)

TOKEN_SECRET: Final = "5f0e9a7c-2d41-4c8b-9d7e-0a1b2c3d4e5f"
API_KEY: Final = "k3y'with\"all$sorts"
USABLE: Final[Mapping[str, Mapping[str, object]]] = {
    "proxmox": {"node": "pve1", "token_id": "felhom-agent@pve!agent", "token_secret": TOKEN_SECRET},
    "hub": {"url": "https://hub.example.com", "host_id": "pve1", "api_key": API_KEY},
}
SHORT_HOST_NAME: Final = socket.gethostname().partition(".")[0]
REQUIRED: Final = "is required"

# Every key of the configuration with its default; "" with REQUIRED has none.
KEYS: Final[Mapping[str, tuple[object, str]]] = {
    "proxmox.url": ("https://127.0.0.1:8006", ""),
    "proxmox.node": (SHORT_HOST_NAME, ""),
    "proxmox.token_id": ("", REQUIRED),
    "proxmox.token_secret": ("", REQUIRED),
    "proxmox.ca_file": ("", ""),
    "proxmox.fingerprint": ("", ""),
    "proxmox.timeout_seconds": (10, ""),
    "hub.url": ("", REQUIRED),
    "hub.host_id": ("", REQUIRED),
    "hub.api_key": ("", REQUIRED),
    "hub.poll_seconds": (900, ""),
    "hub.timeout_seconds": (30, ""),
    "hub.ca_file": ("", ""),
    "cloudflared.unit": ("cloudflared.service", ""),
}
INTEGERS: Final = [key for key, (default, _) in KEYS.items() if isinstance(default, int)]
STRINGS: Final = [key for key in KEYS if key not in INTEGERS]
SECRETS: Final = ["proxmox.token_secret", "hub.api_key"]


def value_of(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def variable(key: str) -> str:
    return f"FELHOM_AGENT_{key.replace('.', '_').upper()}"


def with_value(key: str, value: object) -> dict[str, dict[str, object]]:
    """A usable document in which one key has this value."""
    section, _, name = key.partition(".")
    document = {each: dict(keys) for each, keys in USABLE.items()}
    document.setdefault(section, {})[name] = value
    return document


def problems(config: Config, *, hub: bool = True) -> list[str]:
    try:
        config.validate(hub=hub)
    except ConfigError as exc:
        return str(exc).split("\n")
    return []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a document (bytes as they are) with an environment."""

    def load_document(document: object, **environ: str) -> Config:
        path = tmp_path / "agent.json"
        path.touch(mode=0o600)
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return load_config(str(path), environ)

    return load_document


# ---- keys -------------------------------------------------------------------------------------------------------------------


def test_table_has_every_key() -> None:
    sections = {"proxmox": ProxmoxConfig, "hub": HubConfig, "cloudflared": CloudflaredConfig}
    assert set(KEYS) == {f"{name}.{item.name}" for name, section in sections.items() for item in dataclasses.fields(section)}


@pytest.mark.parametrize("key", KEYS)
def test_default(load: Load, key: str) -> None:
    default, lack = KEYS[key]
    config = load({})
    assert value_of(config, key) == default
    assert [line for line in problems(config) if key in line] == ([f"config: {key}: {lack}"] if lack else [])


def test_example_without_its_secrets_lacks_nothing_else() -> None:
    path = Path(felhom_agent.__file__).with_name("agent.example.json")
    assert problems(load_config(str(path), {})) == [f"config: {key}: is required" for key in SECRETS]
    with_secrets = load_config(str(path), {variable(key): TOKEN_SECRET for key in SECRETS})
    assert problems(with_secrets) == []
    document = json.loads(path.read_text("utf-8"))
    assert {f"{section}.{key}" for section, keys in document.items() for key in keys} <= set(KEYS)
    assert not document["proxmox"]["token_secret"]
    assert not document["hub"]["api_key"]


@pytest.mark.parametrize("wrong", [1, True, None, 1.5, [], {}, ["x"]], ids=repr)
@pytest.mark.parametrize("key", STRINGS)
def test_what_is_no_string_is_refused(load: Load, key: str, wrong: object) -> None:
    assert f"config: {key}: must be a string" in problems(load(with_value(key, wrong)))


@pytest.mark.parametrize("wrong", ["60", True, None, 60.0, 1e99, [], {}], ids=repr)
@pytest.mark.parametrize("key", INTEGERS)
def test_what_is_no_integer_is_refused(load: Load, key: str, wrong: object) -> None:
    assert problems(load(with_value(key, wrong))) == [f"config: {key}: must be an integer"]


@pytest.mark.parametrize("section", ["proxmox", "hub", "cloudflared", "authz"])
@pytest.mark.parametrize("wrong", ["x", 1, None, [], [{}]], ids=repr)
def test_section_that_is_no_object_is_refused(load: Load, section: str, wrong: object) -> None:
    assert f"config: {section}: must be an object" in problems(load({**USABLE, section: wrong}))


@pytest.mark.parametrize("authz", [{}, {"keys": [1, 2], "more": {"deep": None}}], ids=["empty", "filled"])
def test_authz_is_accepted_and_not_read(load: Load, caplog: pytest.LogCaptureFixture, authz: object) -> None:
    assert load({**USABLE, "authz": authz}) == load(USABLE)
    assert warnings(caplog) == []


ACCEPTED: Final[Mapping[str, list[object]]] = {
    "proxmox.node": ["pve1", "PVE-1", "0", "a" * 63],
    "proxmox.token_id": ["root@pam!x", "felhom-agent@pve!agent", "a.b_c@my.realm-1!t_1.x-y", "per@son@ldap!t"],
    "proxmox.fingerprint": ["", "ab" * 32, ":".join(["AB"] * 32), ":".join(["0f"] * 32)],
    "proxmox.timeout_seconds": [1, 10, 300],
    "hub.host_id": ["x", "Küche 3", "a" * 255, "host/1#2"],
    "hub.timeout_seconds": [1, 30, 300],
    "hub.poll_seconds": [0, 10**30, 60, 3600],
    "cloudflared.unit": ["cloudflared.service", "cloudflared@home.service", "a-b\\x2dc.service", "x"],
    "proxmox.token_secret": [TOKEN_SECRET, "!", "~" * 4096],
    "hub.api_key": [API_KEY, "a:b@c/d?e"],
}
REFUSED: Final[Mapping[str, list[object]]] = {
    "proxmox.node": ["pve1.example.com", "../x", "a/b", "a b", "-x", "x-", "ü", "pve1\n", "."],
    "proxmox.token_id": [
        "root@pam",
        "root!x",
        "@pam!x",
        "root@pam!",
        "root@pam!x y",
        "rööt@pam!x",
        "root@pam!x\n",
        "x@pam!x\r\nA: b",
        "a/b@pam!x",
    ],
    "proxmox.fingerprint": ["ab", "ab" * 31, "ab" * 33, "gg" * 32, ":".join(["AB"] * 32) + ":", " " + "ab" * 32, "ab" * 32 + "\n"],
    "proxmox.timeout_seconds": [0, -1, 301, 10**30],
    "hub.timeout_seconds": [0, -1, 301, 10**30],
    "hub.host_id": [" ", " x", "x ", "a\nb", "a\x00b", "a\udcff", "a" * 256],
    "cloudflared.unit": ["", "-x.service", "--version", "a b", "a;b", "a/b", "x\n", "$(x)", "ü.service", "a" * 256],
    "proxmox.token_secret": ["", " ", "a b", "a\tb", "a\nb", "a\r\nX: y", "schlüssel", "a\x7fb", "a\x00b", "trailing ", "trailing\n", "☃"],
    "hub.api_key": ["", " ", "a b", "a\tb", "a\nb", "a\r\nX: y", "schlüssel", "a\x7fb", "a\x00b", "trailing ", "trailing\n", "☃"],
}


def rows(table: Mapping[str, list[Any]]) -> list[Any]:
    return [pytest.param(key, value, id=f"{key}={str(value)[:25]!r}") for key, values in table.items() for value in values]


@pytest.mark.parametrize(("key", "value"), rows(ACCEPTED))
def test_value_is_accepted(load: Load, key: str, value: object) -> None:
    assert problems(load(with_value(key, value))) == []


@pytest.mark.parametrize(("key", "value"), rows(REFUSED))
def test_value_is_refused_by_name_alone(load: Load, key: str, value: object) -> None:
    found = problems(load(with_value(key, value)))
    assert len(found) == 1
    assert found[0].startswith(f"config: {key}: ")


# ---- addresses --------------------------------------------------------------------------------------------------------------

HTTPS: Final = [
    "https://h",
    "https://h/",
    "https://h:8443",
    "HTTPS://Hub.Example.com",
    "https://192.0.2.1:8006",
    "https://[2001:db8::1]:8006",
]
LOOPBACK: Final = ["http://localhost", "http://LOCALHOST:80/", "http://127.0.0.1:8006", "http://127.8.9.10", "http://[::1]:8006"]
NOT_HTTPS: Final = [
    "http://hub.example.com",
    "http://192.168.1.1:8006",
    "http://0.0.0.0",
    "http://[::]",
    "http://localhost.example.com",
    "http://127.0.0.1.example.com",
    "http://127.1",
    "http://2130706433",
    "ftp://localhost",
    "file://localhost",
    "//hub.example.com",
]
NO_ADDRESS: Final = [
    "hub.example.com",
    "localhost:8006",
    "https://",
    "https:h",
    "https://:443",
    "https://h:99999",
    "https://h:x",
    "https://[::1",
    "https://h x",
    "https://h\n",
    "https://h\r\nX: y",
    "ht\ttps://h",
    "https://hüb.example.com",
    "https://h?x=1",
    "https://h#x",
    " https://h",
    "/etc/passwd",
]


@pytest.mark.parametrize("key", ["proxmox.url", "hub.url"])
@pytest.mark.parametrize("url", HTTPS + LOOPBACK)
def test_address_with_tls_or_on_loopback_is_accepted(load: Load, key: str, url: str) -> None:
    assert problems(load(with_value(key, url))) == []


@pytest.mark.parametrize("key", ["proxmox.url", "hub.url"])
@pytest.mark.parametrize("url", NOT_HTTPS)
def test_secrets_go_nowhere_without_tls(load: Load, key: str, url: str) -> None:
    assert problems(load(with_value(key, url))) == [f"config: {key}: must be https, got {url}"]


@pytest.mark.parametrize("key", ["proxmox.url", "hub.url"])
@pytest.mark.parametrize("url", NO_ADDRESS, ids=ascii)
def test_what_is_no_address_is_refused(load: Load, key: str, url: str) -> None:
    (problem,) = problems(load(with_value(key, url)))
    assert problem.startswith(f"config: {key}: must be https")


@pytest.mark.parametrize(
    "url", ["https://user:hunter2@h", "https://hunter2@h", "https://h?key=hunter2", "https://h#hunter2", "https://h:x@hunter2"]
)
def test_password_in_an_address_is_not_shown(load: Load, url: str) -> None:
    (problem,) = problems(load(with_value("hub.url", url)))
    assert "hunter2" not in problem


def test_host_with_a_percent_sign_is_refused(load: Load) -> None:
    """urllib.request would read it as another host, and so as a proxy."""
    assert problems(load(with_value("hub.url", "https://hub%2eexample.com"))) != []


def test_only_the_hub_has_a_path(load: Load) -> None:
    assert problems(load(with_value("hub.url", "https://h/a/prefix/"))) == []
    assert problems(load(with_value("proxmox.url", "https://h:8006/api2/json"))) == [
        "config: proxmox.url: must be https://host[:port], got https://h:8006/api2/json"
    ]


# ---- environment ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_environment_wins_over_the_file(load: Load, key: str) -> None:
    ours, theirs = (61, "62") if key in INTEGERS else ("/of/the/file", "/of/the/environment")
    assert value_of(load(with_value(key, ours)), key) == ours
    assert value_of(load(with_value(key, ours), **{variable(key): theirs}), key) == (62 if key in INTEGERS else theirs)


@pytest.mark.parametrize("key", KEYS)
def test_empty_variable_counts_as_unset(load: Load, caplog: pytest.LogCaptureFixture, key: str) -> None:
    ours: object = 61 if key in INTEGERS else "/of/the/file"
    assert value_of(load(with_value(key, ours), **{variable(key): ""}), key) == ours
    assert warnings(caplog) == []


@pytest.mark.parametrize("key", KEYS)
def test_environment_mends_a_wrong_type_in_the_file(load: Load, key: str) -> None:
    good = ACCEPTED.get(key, ["https://h"])[-1]
    assert problems(load(with_value(key, None), **{variable(key): str(good)})) == []


def test_environment_alone_is_enough(load: Load) -> None:
    environ = {variable(f"{section}.{key}"): str(value) for section, keys in USABLE.items() for key, value in keys.items()}
    config = load({}, **environ)
    assert problems(config) == []
    assert config == load(USABLE)


@pytest.mark.parametrize("bad", ["ten", "1.5", "1e3", "0x10", "1_0", "1 0", "-", "٣", "9" * 5000], ids=lambda bad: ascii(bad[:9]))
@pytest.mark.parametrize("key", INTEGERS)
def test_bad_integer_warns_and_keeps_the_value_of_the_file(load: Load, caplog: pytest.LogCaptureFixture, key: str, bad: str) -> None:
    config = load(with_value(key, 77), **{variable(key): bad})
    assert value_of(config, key) == 77
    assert problems(config) == []
    (warning,) = warnings(caplog)
    assert variable(key) in warning


@pytest.mark.parametrize(("given", "read"), [("0", 0), ("301", 301), ("-1", -1)])
@pytest.mark.parametrize("key", ["proxmox.timeout_seconds", "hub.timeout_seconds"])
def test_integer_of_the_environment_is_judged_as_the_files(load: Load, key: str, given: str, read: int) -> None:
    from_environment, from_file = load(USABLE, **{variable(key): given}), load(with_value(key, read))
    assert problems(from_environment) == problems(from_file) == [f"config: {key}: must be from 1 to 300, got {read}"]


def test_variable_of_no_key_is_not_read(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    assert load(USABLE, FELHOM_AGENT_HUB_X="1", FELHOM_AGENT_AUTHZ="1", HUB_URL="https://x") == load(USABLE)
    assert warnings(caplog) == []


# ---- interval ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", [-5, 0, 1, 59, 60, 61, 900, 3599, 3600, 3601, 10**15])
@pytest.mark.parametrize("overlay", [False, True], ids=["file", "environment"])
def test_interval_is_clamped_with_a_warning(load: Load, caplog: pytest.LogCaptureFixture, wish: int, overlay: bool) -> None:
    key = "hub.poll_seconds"
    config = load(USABLE, **{variable(key): str(wish)}) if overlay else load(with_value(key, wish))
    used = min(max(wish, 60), 3600)
    assert config.hub.poll_seconds == used
    assert problems(config) == []
    told = [line for line in warnings(caplog) if key in line and str(wish) in line and str(used) in line]
    assert len(warnings(caplog)) == len(told) == (0 if used == wish else 1)


def test_bounds_of_the_interval() -> None:
    assert (MIN_POLL_SECONDS, MAX_POLL_SECONDS) == (60, 3600)


# ---- problems ---------------------------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(load: Load) -> None:
    document = {
        "proxmox": {"url": "http://pve.example.com", "node": 5, "token_id": "root@pam", "token_secret": "a b", "timeout_seconds": 0},
        "hub": {"url": "", "host_id": None, "timeout_seconds": "30"},
        "cloudflared": {"unit": "-x"},
        "authz": [],
    }
    keys = ["authz", "cloudflared.unit", "hub.api_key", "hub.host_id", "hub.timeout_seconds", "hub.url"]
    keys += [f"proxmox.{key}" for key in ("node", "timeout_seconds", "token_id", "token_secret", "url")]
    found = problems(load(document))
    assert sorted({line.split(": ")[1] for line in found}) == keys
    assert all(line.startswith("config: ") for line in found)


@pytest.mark.parametrize("hub", [None, "x", {}, {"url": 5, "poll_seconds": "x"}, {"url": "http://h", "api_key": "a b"}], ids=repr)
def test_without_the_hub_its_section_may_be_broken(load: Load, hub: object) -> None:
    config = load({**USABLE, "hub": hub})
    assert problems(config)
    assert problems(config, hub=False) == []


def test_without_the_hub_the_rest_is_judged(load: Load) -> None:
    config = load({"hub": "x", "cloudflared": {"unit": ""}, "authz": 1})
    assert sorted(line.split(": ")[1] for line in problems(config, hub=False)) == [
        "authz",
        "cloudflared.unit",
        "proxmox.token_id",
        "proxmox.token_secret",
    ]


@pytest.mark.parametrize("hub", ["hub2", "hubs"])
def test_unknown_key_is_named_and_the_agent_starts(load: Load, caplog: pytest.LogCaptureFixture, hub: str) -> None:
    document = {**USABLE, hub: {"api_key": API_KEY}, "hub": {**USABLE["hub"], "retries": 5}, "cloudflared": {"new\nkey": API_KEY}}
    assert problems(load(document)) == []
    assert sorted(warnings(caplog)) == [
        "config: unknown key cloudflared.new\\x0akey is ignored",
        "config: unknown key hub.retries is ignored",
        f"config: unknown key {hub} is ignored",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "line 1 column 1", id="empty"),
        pytest.param(b'{\n  "hub": {\n    "url" "x"\n  }\n}', "line 3 column 11", id="colon missing"),
        pytest.param(b'{"hub": {},}', "line 1 column 1", id="comma too many"),
        pytest.param(b"{}\n{}", "line 2 column 1", id="two documents"),
        pytest.param(b'{} // "x"', "line 1 column 4", id="comment"),
        pytest.param(b'{"hub": {"url": "a", "url": "b"}}', "duplicate key url", id="duplicate key"),
        pytest.param(b'{"hub": {}, "hub": {}}', "duplicate key hub", id="duplicate section"),
        pytest.param(b'{"a\\nb": 1, "a\\nb": 1}', "duplicate key a\\x0ab", id="duplicate key with a line feed"),
        pytest.param(b'{"hub": {"host_id": "\xff"}}', "utf-8", id="not UTF-8"),
        pytest.param('{"hub": {}}'.encode("utf-16"), "utf-8", id="UTF-16"),
        pytest.param(b"[]", "must be a JSON object", id="list"),
        pytest.param(b"null", "must be a JSON object", id="null"),
        pytest.param(b'"x"', "must be a JSON object", id="string"),
        pytest.param(b"[" * 100_000, "", id="brackets without end"),
        pytest.param(b'{"hub": {"poll_seconds": ' + b"9" * 10_000 + b"}}", "", id="number without end"),
        pytest.param(b" " * (5 << 20), "larger than", id="5 MiB"),
    ],
)
def test_file_that_is_no_configuration_is_refused(load: Load, tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(content)
    message = str(caught.value)
    assert message.startswith(f"config: {tmp_path}/agent.json: ")
    assert reason.lower() in message.lower()
    assert message.isprintable()


@pytest.mark.parametrize("content", [b'{"hub": {"api_key": "%s" "x"}}', b'{"hub": {"api_key": "%s\n"}}', b'{"hub": {"api_key": "%s\xff"}}'])
def test_error_in_the_file_does_not_show_the_line(load: Load, content: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        load(content.replace(b"%s", TOKEN_SECRET.encode()))
    assert TOKEN_SECRET not in str(caught.value)


def test_byte_order_mark_is_no_error(load: Load) -> None:
    assert load(b"\xef\xbb\xbf" + json.dumps(USABLE).encode()) == load(USABLE)


# ---- files ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path: Path) -> Callable[[str], str]:
    """Write a configuration file whose host_id is its folder's name."""

    def write(folder: str) -> str:
        path = tmp_path / folder / "agent.json"
        path.parent.mkdir()
        path.touch(mode=0o600)
        path.write_text(json.dumps({"hub": {"host_id": folder}}), "utf-8")
        return str(path)

    return write


def test_option_before_variable_before_credential(named: Callable[[str], str]) -> None:
    option, by_variable, credential = named("option"), named("variable"), named("credential")
    environ = {"CREDENTIALS_DIRECTORY": os.path.dirname(credential)}
    assert load_config(None, environ).hub.host_id == "credential"
    environ["FELHOM_AGENT_CONFIG"] = by_variable
    assert load_config(None, environ).hub.host_id == "variable"
    assert load_config(option, environ).hub.host_id == "option"
    environ["FELHOM_AGENT_CONFIG"] = ""
    assert load_config(None, environ).hub.host_id == "credential"


@pytest.mark.skipif(os.path.lexists(felhom_agent.DEFAULT_PATH), reason="this machine has a configuration of its own")
@pytest.mark.parametrize(
    "environ", [{}, {"CREDENTIALS_DIRECTORY": "/nonexistent", "FELHOM_AGENT_CONFIG": ""}, {"CREDENTIALS_DIRECTORY": ""}], ids=repr
)
def test_file_that_nobody_named_may_be_missing(environ: Mapping[str, str]) -> None:
    assert load_config(None, {**environ, "FELHOM_AGENT_HUB_HOST_ID": "x"}).hub.host_id == "x"


@pytest.mark.parametrize("by_variable", [False, True], ids=["option", "variable"])
def test_file_that_was_named_and_is_missing_is_an_error(tmp_path: Path, by_variable: bool) -> None:
    path = str(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=f"^config: {path}: no such file$"):
        load_config(None if by_variable else path, {"FELHOM_AGENT_CONFIG": path} if by_variable else {})


@pytest.mark.parametrize("key", ["proxmox.ca_file", "hub.ca_file"])
@pytest.mark.parametrize("overlay", [False, True], ids=["file", "environment"])
def test_relative_ca_file_lies_beside_the_configuration(load: Load, tmp_path: Path, key: str, overlay: bool) -> None:
    config = load(USABLE, **{variable(key): "ca.pem"}) if overlay else load(with_value(key, "ca.pem"))
    assert value_of(config, key) == str(tmp_path / "ca.pem")
    assert value_of(load(with_value(key, "/etc/ca.pem")), key) == "/etc/ca.pem"


def test_relative_ca_file_lies_beside_a_relative_configuration(named: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = named("folder")
    monkeypatch.chdir(os.path.dirname(path))
    assert load_config("agent.json", {"FELHOM_AGENT_HUB_CA_FILE": "ca.pem"}).hub.ca_file == os.path.join(os.path.dirname(path), "ca.pem")


@pytest.mark.parametrize(("mode", "warns"), [(0o400, 0), (0o600, 0), (0o700, 0), (0o640, 1), (0o604, 1), (0o644, 1), (0o440, 1)], ids=oct)
def test_file_that_others_may_read_is_warned_of(
    named: Callable[[str], str], caplog: pytest.LogCaptureFixture, mode: int, warns: int
) -> None:
    path = named("folder")
    os.chmod(path, mode)
    load_config(path, {})
    assert len([line for line in warnings(caplog) if path in line and "chmod 600" in line]) == len(warnings(caplog)) == warns


@pytest.mark.parametrize("name_it", [False, True], ids=["found", "named"])
def test_mode_of_a_credential_is_systemds_affair(named: Callable[[str], str], caplog: pytest.LogCaptureFixture, name_it: bool) -> None:
    path = named("credentials")
    os.chmod(path, 0o440)
    load_config(path if name_it else None, {"CREDENTIALS_DIRECTORY": os.path.dirname(path)})
    assert warnings(caplog) == []


def make_unfit(folder: Path, kind: str) -> Path:
    path = folder / "unfit"
    match kind:
        case "symbolic link":
            (folder / "target").write_text("{}", "utf-8")
            path.symlink_to("target")
        case "dangling link":
            path.symlink_to("nowhere")
        case "FIFO":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
        case "too large":
            with path.open("wb") as file:
                file.truncate(5 << 20)
        case "device":
            return Path("/dev/zero")
        case "below a file":
            path.touch()
            return path / "x"
    return path


UNFIT: Final[Mapping[str, str]] = {
    "symbolic link": "is a symbolic link, name the file itself",
    "dangling link": "is a symbolic link, name the file itself",
    "FIFO": "is not a regular file",
    "directory": "Is a directory",
    "socket": "No such device or address",
    "device": "is not a regular file",
    "too large": "is larger than 4194304 bytes",
    "below a file": "Not a directory",
}


@pytest.fixture
def at_once() -> Iterator[None]:
    """Opening the wrong thing may wait for ever: five seconds end that."""

    def late(_signal: int, _frame: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", UNFIT)
def test_configuration_that_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = make_unfit(tmp_path, kind)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), {})
    assert str(caught.value) == f"config: {path}: {UNFIT[kind]}"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", [*UNFIT, "no PEM", "empty", "missing"])
@pytest.mark.parametrize("section", ["proxmox", "hub"])
def test_ca_that_is_no_regular_file_is_refused_at_once(load: Load, tmp_path: Path, section: str, kind: str) -> None:
    path = make_unfit(tmp_path, kind)
    if kind in ("no PEM", "empty"):
        path.write_text("-----BEGIN CERTIFICATE-----\n" if kind == "no PEM" else "", "ascii")
    config = load(with_value(f"{section}.ca_file", str(path)))
    with pytest.raises(ConfigError) as caught:
        felhom_agent.ProxmoxClient(config.proxmox) if section == "proxmox" else felhom_agent.HubClient(config.hub, logger=felhom_agent.LOG)
    reason = {**UNFIT, **dict.fromkeys(("no PEM", "empty"), "holds no PEM certificate"), "missing": "No such file or directory"}[kind]
    assert str(caught.value) == f"config: {section}.ca_file: {path}: {reason}"


# ---- secrets ----------------------------------------------------------------------------------------------------------------


def test_secrets_are_redacted(load: Load) -> None:
    config = load(USABLE)
    shown = config.redacted()
    assert shown == {
        "proxmox": {
            "url": "https://127.0.0.1:8006",
            "node": "pve1",
            "token_id": "felhom-agent@pve!agent",
            "token_secret": "***",
            "ca_file": "",
            "fingerprint": "",
            "timeout_seconds": 10,
        },
        "hub": {
            "url": "https://hub.example.com",
            "host_id": "pve1",
            "api_key": "***",
            "poll_seconds": 900,
            "timeout_seconds": 30,
            "ca_file": "",
        },
        "cloudflared": {"unit": "cloudflared.service"},
    }
    for text in (repr(config), str(config), repr(config.proxmox), f"{config.hub}", json.dumps(shown)):
        assert TOKEN_SECRET not in text
        assert "k3y" not in text


def test_secret_pasted_into_the_token_id_is_not_shown(load: Load) -> None:
    (problem,) = problems(load(with_value("proxmox.token_id", f"root@pam!x={TOKEN_SECRET}")))
    assert problem.startswith("config: proxmox.token_id: must be user@realm!tokenname")
    assert TOKEN_SECRET not in problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("proxmox.token_id", f"root@pam!x={TOKEN_SECRET}"),
        ("hub.url", f"https://agent:{TOKEN_SECRET}@hub.example.com"),
        ("hub.url", f"https://hub.example.com/?key={TOKEN_SECRET}"),
    ],
)
def test_what_is_refused_may_be_a_secret_and_is_not_printed(load: Load, key: str, value: str) -> None:
    assert TOKEN_SECRET not in json.dumps(load(with_value(key, value)).redacted())


def test_empty_secret_is_shown_as_empty(load: Load) -> None:
    shown = json.loads(json.dumps(load({}).redacted()))
    assert (shown["proxmox"]["token_secret"], shown["hub"]["api_key"]) == ("", "")


@pytest.mark.parametrize("key", SECRETS)
@pytest.mark.parametrize("tail", [" ", "\n", "\u00e9", "\x00", "\ud800", "\x7f", "\u2028"], ids=ascii)
@pytest.mark.parametrize("overlay", [False, True], ids=["file", "environment"])
def test_refused_secret_is_not_shown(load: Load, caplog: pytest.LogCaptureFixture, key: str, tail: str, overlay: bool) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "hunter2hunter2" + tail
    config = load(USABLE, **{variable(key): secret}) if overlay else load(with_value(key, secret))
    (problem,) = problems(config)
    assert problem == f"config: {key}: must be printable ASCII without spaces (not shown)"
    assert "hunter2" not in problem + repr(config) + json.dumps(config.redacted()) + caplog.text


# ---- whatever the file says -------------------------------------------------------------------------------------------------

ANY_JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["https://h", "a@b!c", "60"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ANY_SECTION: Final = st.dictionaries(st.sampled_from([key.partition(".")[2] for key in KEYS]) | st.text(max_size=8), ANY_JSON, max_size=8)
ANY_DOCUMENT: Final = ANY_JSON | st.dictionaries(st.sampled_from(["proxmox", "hub", "cloudflared", "authz", "x"]), ANY_SECTION | ANY_JSON)
ANY_VALUE: Final = st.text(st.characters(exclude_characters="\0"), max_size=30) | st.integers().map(str)


def judge(load: Load, document: object, environ: Mapping[str, str]) -> None:
    """Load and validate: a usable configuration or the agent's own error, in lines that can be shown."""
    try:
        config = load(document, **environ)
    except ConfigError as exc:
        found = str(exc).split("\n")
    else:
        assert 60 <= config.hub.poll_seconds <= 3600
        json.dumps(config.redacted(), allow_nan=False)
        found = problems(config)
    assert all(line.startswith("config: ") and line.isprintable() for line in found)


@given(document=ANY_DOCUMENT, environ=st.dictionaries(st.sampled_from([variable(key) for key in KEYS]), ANY_VALUE, max_size=5))
def test_any_document_is_a_configuration_or_an_error(load: Load, document: object, environ: dict[str, str]) -> None:
    judge(load, document, environ)


@given(content=st.binary(max_size=50) | st.text(alphabet='{}[]",:\\u0 1e-hub', max_size=50).map(str.encode))
def test_any_bytes_are_a_configuration_or_an_error(load: Load, content: bytes) -> None:
    judge(load, content, {})


@given(key=st.sampled_from(sorted(KEYS)), value=ANY_JSON)
def test_any_value_is_accepted_or_refused_by_name(load: Load, key: str, value: object) -> None:
    assert all(line.startswith(f"config: {key}: ") for line in problems(load(with_value(key, value))))
