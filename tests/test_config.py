"""Configuration: file, environment, defaults, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

import felhom_agent as agent
from support import EXTRAS, MODULE, messages

TOKEN_SECRET: Final = "5f0e9a7c-2d41-4c8b-9d7e-0a1b2c3d4e5f"
API_KEY: Final = "k3y'with\"all$sorts"
VALID: Final[Mapping[str, Mapping[str, object]]] = {
    "proxmox": {"node": "pve1", "token_id": "felhom-agent@pve!agent", "token_secret": TOKEN_SECRET},
    "hub": {"url": "https://hub.example.com", "host_id": "pve1", "api_key": API_KEY},
}
FIELDS: Final = {
    f"{name}.{item.name}": item
    for name, section in agent.SECTIONS.items()
    for item in dataclasses.fields(section)
}
# Every key and the type of its value
KEYS: Final = {key: str(item.type).partition("[")[0] for key, item in FIELDS.items()}
INTEGERS: Final = [key for key in KEYS if KEYS[key] == "int"]
SECRETS: Final = ["proxmox.token_secret", "hub.api_key"]

NOT_HTTPS: Final = [
    *("http://hub.example.com", "http://192.168.1.1:8006", "http://0.0.0.0", "http://[::]"),
    *("http://localhost.example.com", "http://127.0.0.1.example.com", "http://127.1"),
    *("http://127-0-0-1", "http://128.0.0.1", "http://[::2]"),
]
GOOD_URLS: Final = [
    *("https://h", "https://h/", "https://192.0.2.1:8006", "https://[2001:db8::1]:8006"),
    *("http://localhost", "http://localhost:80/", "http://127.0.0.1:8006", "http://127.8.9.10"),
    *("http://[::1]:8006", "https://Hub.example.com:8443"),
]
BAD_URLS: Final = [
    *("hub.example.com", "localhost:8006", "https://", "https:h", "https://:443", "/etc/passwd"),
    *("https://h:x", "https://h:0", "https://h:65536", "https://[::1", "https://h x", "//h"),
    *("https://h\n", "https://h\r\nX: y", "ht\ttps://h", "https://hüb.example.com", "https://h/ü"),
    *("ftp://localhost", " https://h", "https://h/a%20b"),
    # urllib.request would read it as another host, and so perhaps use a proxy.
    "https://hub%2eexample.com",
    *("https://user:pw@h", "https://pw@h", "https://h?key=pw", "https://h#pw", "https://h:x@pw"),
    *("http://user:pw@h", "http://h?key=pw"),
]
BAD_SECRETS: Final = [
    *("with space", "a\tb", "a\r\nX: y", "gehéim", "a\x7f", "a\x00b", "tail ", "tail\n", "a\ud800"),
]
# The last of each is not the default.
ACCEPTED: Final[Mapping[str, list[Any]]] = {
    "proxmox.url": GOOD_URLS,
    "proxmox.node": ["PVE-1", "0", "a" * 63],
    "proxmox.token_id": ["felhom-agent@pve!agent", "a.b_c@my.realm-1!t_1.x-y", "per@son@ldap!t"],
    "proxmox.token_secret": ["!", "~" * 4096],
    "proxmox.ca_file": ["/etc/ca.pem"],
    "proxmox.fingerprint": [":".join(["AB"] * 32), "0f" * 32],
    "proxmox.timeout_seconds": [1, 9, 10, 99, 100, 299, 300],
    "proxmox.extras": [[], *([name] for name in EXTRAS), [*EXTRAS]],
    "hub.url": [*GOOD_URLS, "https://h/a/prefix", "https://h:8443/a/prefix/"],
    "hub.host_id": ["x", "Küche 3", "a" * 255, "host/1#2"],
    "hub.api_key": [API_KEY, "a:b@c/d?e"],
    "hub.poll_seconds": [60, 3600],
    "hub.timeout_seconds": [1, 300],
    "hub.ca_file": ["/etc/ca.pem"],
    "cloudflared.unit": ["cloudflared@home.service", "a-b\\x2dc.service", "x"],
}
REFUSED: Final[Mapping[str, list[Any]]] = {
    "proxmox.url": [*BAD_URLS, "https://h:8006/api2/json"],
    "proxmox.node": ["pve1.example.com", "https://pve1", "a/b", "a b", "ü", "pve1\n", "."],
    "proxmox.token_id": [
        *("root@pam", "root!x", "@pam!x", "root@pam!", "root@pam!x y", "a/b@pam!x"),
        *("jürgen@ad!mon", "root@pam!x\n", "x@pam!x\r\nA: b", f"root@pam!x={TOKEN_SECRET}"),
    ],
    "proxmox.token_secret": BAD_SECRETS,
    "proxmox.ca_file": ["ca.pem", "./ca.pem", "~/ca.pem", "/a\x00b"],
    "proxmox.fingerprint": ["ab", "ab" * 31, "ab" * 33, "gg" * 32, " " + "ab" * 32],
    "proxmox.timeout_seconds": [0, -1, 301, 10**30],
    "proxmox.extras": [["pbs"], ["QEMU"], ["qemu", "lxc"], ["qemu,storage"]],
    "hub.url": BAD_URLS,
    "hub.host_id": [" ", " x", "x ", "a\nb", "a" * 256],
    "hub.api_key": BAD_SECRETS,
    "hub.timeout_seconds": [0, -1, 301, 10**30],
    "hub.ca_file": ["ca.pem", "./ca.pem", "~/ca.pem"],
    "cloudflared.unit": ["-x.service", "--version", "a b", "a;b", "a/b", "x\n", "$(x)", "a" * 256],
}
WRONG_TYPES: Final[Mapping[str, list[Any]]] = {
    "str": [1, True, None, 1.5, [], {}, ["x"]],
    "int": ["60", True, None, 60.0, 1e99, [], {}],
    "tuple": ["qemu", 1, True, None, {}, [1], ["qemu", None]],
    "section": ["x", 1, None, [], [{}]],
}


def as_text(value: object) -> str:
    """Return a value as it is written in the environment."""
    return ",".join(value) if isinstance(value, list | tuple) else str(value)


def text_of(config: agent.Config, key: str) -> str:
    section, _, name = key.partition(".")
    return as_text(getattr(getattr(config, section), name))


def with_value(key: str, value: object) -> dict[str, dict[str, object]]:
    """Return a valid file in which one key has this value."""
    section, _, name = key.partition(".")
    document = {each: dict(keys) for each, keys in VALID.items()}
    document.setdefault(section, {})[name] = value
    return document


def with_variable(key: str, value: object) -> dict[str, str]:
    return {f"FELHOM_AGENT_{key.replace('.', '_').upper()}": as_text(value)}


def problems(config: agent.Config, *, hub: bool = True) -> dict[str, str]:
    """Return the problems by key; each line has the form `config: KEY: PROBLEM`."""
    try:
        config.validate(hub=hub)
    except agent.ConfigError as exc:
        lines = [line.split(": ", 2) for line in str(exc).split("\n")]
        assert {line[0] for line in lines} == {"config"}
        return {line[1]: line[2] for line in lines}
    return {}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for level, text in messages(caplog) if level == "WARNING"]


Load = Callable[..., agent.Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a document (bytes as they are) with an environment."""

    def load_document(document: object, environ: Mapping[str, str] = {}) -> agent.Config:
        path = tmp_path / "agent.json"
        path.touch(mode=0o600)
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return agent.load_config(str(path), environ)

    return load_document


@pytest.fixture(params=["file", "environment"])
def load_value(request: pytest.FixtureRequest, load: Load) -> Load:
    """Load a valid configuration in which one key has this value, wherever it stands."""
    in_file = request.param == "file"
    return lambda key, value: (
        load(with_value(key, value)) if in_file else load(VALID, with_variable(key, value))
    )


def test_byte_order_mark_is_no_problem(load: Load) -> None:
    assert load(b"\xef\xbb\xbf" + json.dumps(VALID).encode()) == load(VALID)


def test_node_is_by_default_the_short_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "pve7.example.com")
    module = runpy.run_path(str(MODULE))
    assert module["ProxmoxConfig"]().node == "pve7"


def test_what_has_no_default_is_required(load: Load) -> None:
    required = [*SECRETS, "proxmox.token_id", "hub.url", "hub.host_id"]
    assert problems(load({})) == dict.fromkeys(required, "is required")


def test_example_lacks_nothing_but_its_secrets() -> None:
    path = str(MODULE.with_name("agent.example.json"))
    assert problems(agent.load_config(path, {})) == dict.fromkeys(SECRETS, "is required")
    environ = {**with_variable(SECRETS[0], "x"), **with_variable(SECRETS[1], "x")}
    assert problems(agent.load_config(path, environ)) == {}


@pytest.mark.parametrize("key", ACCEPTED)
def test_wrong_type_is_refused_unless_the_environment_mends_it(load: Load, key: str) -> None:
    for value in WRONG_TYPES[KEYS[key]]:
        assert problems(load(with_value(key, value)))[key].startswith("must be "), value
        assert problems(load(with_value(key, value), with_variable(key, ACCEPTED[key][-1]))) == {}


@pytest.mark.parametrize("key", ACCEPTED)
def test_environment_wins_over_the_file_unless_it_is_empty(
    load: Load, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    in_file = {"int": 61, "str": "/file", "tuple": ["storage"]}[KEYS[key]]
    config = load(with_value(key, in_file), with_variable(key, ACCEPTED[key][-1]))
    assert text_of(config, key) == as_text(ACCEPTED[key][-1])
    config = load(with_value(key, ACCEPTED[key][-1]), with_variable(key, ""))
    assert text_of(config, key) == as_text(ACCEPTED[key][-1])
    assert text_of(load({}, with_variable(key, "")), key) == text_of(load({}), key)
    assert warnings(caplog) == []


@pytest.mark.parametrize("section", [*agent.SECTIONS, "authz"])
def test_section_that_is_not_an_object_is_refused(load: Load, section: str) -> None:
    for value in WRONG_TYPES["section"]:
        assert problems(load({**VALID, section: value}))[section] == "must be an object"


def test_authz_is_accepted_and_not_read(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    assert load({**VALID, "authz": {"keys": [1, 2], "more": {"deep": None}}}) == load(VALID)
    assert warnings(caplog) == []


@pytest.mark.parametrize("key", ACCEPTED)
def test_value_is_accepted(load_value: Load, key: str) -> None:
    for value in ACCEPTED[key]:
        config = load_value(key, value)
        assert (problems(config), text_of(config, key)) == ({}, as_text(value))


@pytest.mark.parametrize("key", REFUSED)
def test_value_is_refused_without_being_shown(load: Load, key: str) -> None:
    expected = FIELDS[key].metadata["expected"]
    for value in REFUSED[key]:
        assert problems(load(with_value(key, value))) == {key: f"must be {expected}"}, value


@pytest.mark.parametrize("key", ["proxmox.url", "hub.url"])
def test_secrets_go_nowhere_without_tls(load_value: Load, key: str) -> None:
    for url in NOT_HTTPS:
        assert problems(load_value(key, url)) == {key: f"must be https, got {url}"}


def test_extras_in_the_environment_are_separated_by_commas(load: Load) -> None:
    key = "proxmox.extras"
    config = load(VALID, with_variable(key, " qemu , storage"))
    assert (problems(config), config.proxmox.extras) == ({}, ("qemu", "storage"))
    assert list(problems(load(VALID, with_variable(key, "qemu,,storage")))) == [key]


@pytest.mark.parametrize("text", ["ten", "1.5", "1e3", "0x10", "1 0", "-"])
@pytest.mark.parametrize("key", INTEGERS)
def test_variable_that_is_not_an_integer_keeps_the_value_of_the_file(
    load: Load, caplog: pytest.LogCaptureFixture, key: str, text: str
) -> None:
    config = load(with_value(key, 77), with_variable(key, text))
    assert (text_of(config, key), problems(config)) == ("77", {})
    [variable] = with_variable(key, text)
    assert warnings(caplog) == [f"config: {variable} is not an integer and is ignored"]


@pytest.mark.parametrize(
    ("seconds", "used"), [(-5, 60), (59, 60), (60, 60), (3600, 3600), (3601, 3600), (10**15, 3600)]
)
def test_poll_interval_is_clamped_with_a_warning(
    load_value: Load, caplog: pytest.LogCaptureFixture, seconds: int, used: int
) -> None:
    config = load_value("hub.poll_seconds", seconds)
    assert (config.hub.poll_seconds, problems(config)) == (used, {})
    told = ["hub.poll_seconds" in text and str(used) in text for text in warnings(caplog)]
    assert told == ([] if used == seconds else [True])


@pytest.mark.parametrize("hub", [None, "x", {}, {"ca_file": "x"}], ids=repr)
def test_without_the_hub_only_the_rest_is_judged(load: Load, hub: object) -> None:
    config = load({**VALID, "hub": hub})
    assert problems(config)
    assert problems(config, hub=False) == {}
    config = load({"hub": hub, "cloudflared": {"unit": "-x"}, "authz": 1})
    keys = ["authz", "cloudflared.unit", "proxmox.token_id", "proxmox.token_secret"]
    assert sorted(problems(config, hub=False)) == keys


def test_unknown_key_is_named_and_ignored(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    document = {**with_value("hub.retries", 5), "hubs": {}, "cloudflared": {"new\nkey": API_KEY}}
    assert load(document) == load(VALID)
    names = sorted(text.split(" is ")[0].split()[-1] for text in warnings(caplog))
    assert names == ["cloudflared.new\\x0akey", "hub.retries", "hubs"]
    assert API_KEY not in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "line 1 column 1", id="empty"),
        pytest.param(b'{\n  "hub": {\n    "url" "%s"\n  }\n}', "line 3 column 11", id="no colon"),
        pytest.param(b'{} // "%s"', "line 1 column 4", id="comment"),
        pytest.param(b'{"hub": {"host_id": "%s\xff"}}', "utf-8", id="not UTF-8"),
        pytest.param(b'["%s"]', "JSON object", id="list"),
        pytest.param(b"[" * 100_000, "", id="brackets without end"),
        pytest.param(b'{"hub": ' + b"9" * 10_000 + b"}", "", id="number without end"),
    ],
)
def test_file_that_is_not_a_configuration_is_refused_and_not_shown(
    load: Load, tmp_path: Path, content: bytes, reason: str
) -> None:
    with pytest.raises(agent.ConfigError) as caught:
        load(content.replace(b"%s", TOKEN_SECRET.encode()))
    message = str(caught.value)
    assert message.startswith(f"config: {tmp_path}/agent.json: ")
    assert reason in message
    assert message.isprintable()
    assert TOKEN_SECRET not in message


def write_named(folder: Path) -> str:
    """Write a configuration file whose host_id is its folder's name."""
    folder.mkdir()
    path = folder / "agent.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps({"hub": {"host_id": folder.name}}), "utf-8")
    return str(path)


def test_option_before_variable_before_credential(tmp_path: Path) -> None:
    option, named = write_named(tmp_path / "option"), write_named(tmp_path / "variable")
    environ = {"CREDENTIALS_DIRECTORY": os.path.dirname(write_named(tmp_path / "credential"))}
    assert agent.load_config(None, environ).hub.host_id == "credential"
    environ["FELHOM_AGENT_CONFIG"] = named
    assert agent.load_config(None, environ).hub.host_id == "variable"
    assert agent.load_config(option, environ).hub.host_id == "option"


@pytest.mark.skipif(os.path.lexists(agent.DEFAULT_PATH), reason="the default path exists here")
@pytest.mark.parametrize("folder", ["", "/nonexistent"])
def test_file_that_nobody_named_may_be_missing(folder: str) -> None:
    environ = {"FELHOM_AGENT_CONFIG": "", "CREDENTIALS_DIRECTORY": folder}
    config = agent.load_config(None, {**environ, **with_variable("hub.host_id", "x")})
    assert config.hub.host_id == "x"


@pytest.mark.parametrize(
    ("name", "problem"),
    [("none", "no such file"), ("", "Is a directory"), ("file/x", "Not a directory")],
    ids=["missing", "directory", "below a file"],
)
def test_file_that_was_named_must_be_readable(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / name)
    for option, variable in ((path, "/nonexistent"), (None, path)):
        with pytest.raises(agent.ConfigError, match=f"^config: {path}: {problem}"):
            agent.load_config(option, {"FELHOM_AGENT_CONFIG": variable})


@pytest.mark.parametrize("mode", [0o400, 0o700, 0o640, 0o604, 0o644], ids=oct)
def test_file_that_others_may_read_is_warned_of_with_a_line_to_paste(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    path = write_named(tmp_path / "it's mine")
    os.chmod(path, mode)
    # systemd itself decides about the mode of a credential.
    agent.load_config(None, {"CREDENTIALS_DIRECTORY": os.path.dirname(path)})
    assert warnings(caplog) == []
    agent.load_config(path, {})
    commands = [shlex.split(text.partition(" run: ")[2]) for text in warnings(caplog)]
    assert commands == ([["chmod", "600", path]] if mode & 0o044 else [])


def test_file_that_only_root_may_read_says_so(tmp_path: Path) -> None:
    path = write_named(tmp_path / "folder")
    os.chmod(path, 0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(agent.ConfigError) as caught:
            agent.load_config(path, {})
    finally:
        os.seteuid(user)
    assert str(caught.value) == f"config: {path}: Permission denied; run this as root"


@pytest.mark.parametrize("key", ["proxmox.ca_file", "hub.ca_file"])
def test_credential_is_read_instead_of_the_ca_file_of_its_name(
    load: Load, tmp_path: Path, key: str
) -> None:
    credential = tmp_path / "pve-root-ca.pem"
    credential.touch()
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    named, other = "/etc/pve/pve-root-ca.pem", "/etc/pve/other.pem"
    assert text_of(load(with_value(key, named), environ), key) == str(credential)
    assert text_of(load(VALID, environ | with_variable(key, named)), key) == str(credential)
    assert text_of(load(with_value(key, other), environ), key) == other
    assert text_of(load(with_value(key, named)), key) == named
    assert text_of(load(VALID, environ), key) == ""


@pytest.mark.parametrize(
    ("name", "problem"),
    [("none", "No such file"), ("empty", "no cert"), ("cut-off", "PEM lib")],
)
def test_ca_file_without_a_certificate_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "cut-off").write_text("-----BEGIN CERTIFICATE-----\n", "ascii")
    path = str(tmp_path / name)
    told = rf"\.ca_file: {path}: no usable PEM file \({problem}[^;]*$"
    with pytest.raises(agent.ConfigError, match=rf"^config: proxmox{told}"):
        agent.ProxmoxClient(agent.ProxmoxConfig(ca_file=path))
    with pytest.raises(agent.ConfigError, match=rf"^config: hub{told}"):
        agent.HubClient(agent.HubConfig(url="https://h", ca_file=path))


def test_ca_file_of_proxmox_that_is_missing_names_what_provides_it() -> None:
    told = "No such file or directory.*; check systemctl status pve-cluster"
    with pytest.raises(agent.ConfigError, match=told):
        agent.ProxmoxClient(agent.ProxmoxConfig(ca_file="/etc/pve/no-such-ca.pem"))


def test_secrets_are_not_in_what_is_shown_of_a_configuration(load: Load) -> None:
    config = load(VALID)
    shown = config.redacted()
    assert (shown["proxmox"]["token_secret"], shown["hub"]["api_key"]) == ("***", "***")
    for text in (repr(config), repr(config.proxmox), repr(config.hub), str(shown)):
        assert TOKEN_SECRET not in text
        assert "k3y" not in text
