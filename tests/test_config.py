"""Configuration: file, environment, defaults, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
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
SECTIONS: Final[Mapping[str, Any]] = {
    "proxmox": agent.ProxmoxConfig(),
    "hub": agent.HubConfig(),
    "cloudflared": agent.CloudflaredConfig(),
}
# Every key and the type of its value.
KEYS: Final[Mapping[str, type]] = {
    f"{section}.{item.name}": type(getattr(defaults, item.name))
    for section, defaults in SECTIONS.items()
    for item in dataclasses.fields(defaults)
}
INTEGERS: Final = [key for key in KEYS if KEYS[key] is int]
URLS: Final = [key for key in KEYS if key.endswith(".url")]
CA_FILES: Final = [key for key in KEYS if key.endswith(".ca_file")]
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
# What the message on it says, after "must be ".
EXPECTED: Final[Mapping[str, str]] = {
    "proxmox.url": "https://host[:port]",
    "proxmox.node": "the node's short name, without a domain",
    "proxmox.token_id": "user@realm!tokenname in ASCII",
    "proxmox.token_secret": "printable ASCII without spaces (not shown)",
    "proxmox.ca_file": "an absolute path",
    "proxmox.fingerprint": "a SHA-256, 64 hexadecimal digits",
    "proxmox.timeout_seconds": "an integer from 1 to 300",
    "proxmox.extras": f"a list of {', '.join(EXTRAS)}",
    "hub.url": "https://host[:port][/path] in ASCII (xn--…), without user, query, fragment or %",
    "hub.host_id": "1 to 255 characters, without spaces at the ends",
    "hub.api_key": "printable ASCII without spaces (not shown)",
    "hub.timeout_seconds": "an integer from 1 to 300",
    "hub.ca_file": "an absolute path",
    "cloudflared.unit": "the name of a systemd unit",
}
WRONG_TYPES: Final[Mapping[type, list[Any]]] = {
    str: [1, True, None, 1.5, [], {}, ["x"]],
    int: ["60", True, None, 60.0, 1e99, [], {}],
    tuple: ["qemu", 1, True, None, {}, [1], ["qemu", None]],
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


def rows(table: Mapping[str, list[Any]]) -> list[Any]:
    pairs = [(key, value) for key, values in table.items() for value in values]
    return [pytest.param(key, value, id=f"{key}={ascii(value)[:25]}") for key, value in pairs]


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


# ---- keys ----------------------------------------------------------------------------------------


def test_defaults(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "pve7.example.com")
    shown = load({}).redacted()
    defaults = {f"{name}.{key}": value for name in shown for key, value in shown[name].items()}
    assert {key: defaults[key] for key in ACCEPTED if defaults[key]} == {
        "proxmox.url": "https://127.0.0.1:8006",
        "proxmox.node": "pve7",
        "proxmox.timeout_seconds": 10,
        "hub.poll_seconds": 900,
        "hub.timeout_seconds": 30,
        "cloudflared.unit": "cloudflared.service",
    }


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
def test_empty_variable_counts_as_unset(
    load: Load, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    config = load(with_value(key, ACCEPTED[key][-1]), with_variable(key, ""))
    assert text_of(config, key) == as_text(ACCEPTED[key][-1])
    assert text_of(load({}, with_variable(key, "")), key) == text_of(load({}), key)
    assert warnings(caplog) == []


@pytest.mark.parametrize("section", [*SECTIONS, "authz"])
@pytest.mark.parametrize("value", ["x", 1, None, [], [{}]], ids=repr)
def test_section_that_is_not_an_object_is_refused(load: Load, section: str, value: object) -> None:
    assert problems(load({**VALID, section: value}))[section] == "must be an object"


def test_authz_is_accepted_and_not_read(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    assert load({**VALID, "authz": {"keys": [1, 2], "more": {"deep": None}}}) == load(VALID)
    assert warnings(caplog) == []


@pytest.mark.parametrize(("key", "value"), rows(ACCEPTED))
def test_value_is_accepted(load_value: Load, key: str, value: object) -> None:
    config = load_value(key, value)
    assert problems(config) == {}
    assert text_of(config, key) == as_text(value)


@pytest.mark.parametrize(("key", "value"), rows(REFUSED))
def test_value_is_refused_without_being_shown(load: Load, key: str, value: object) -> None:
    assert problems(load(with_value(key, value))) == {key: f"must be {EXPECTED[key]}"}


@pytest.mark.parametrize("key", URLS)
@pytest.mark.parametrize("url", NOT_HTTPS)
def test_secrets_go_nowhere_without_tls(load_value: Load, key: str, url: str) -> None:
    assert problems(load_value(key, url)) == {key: f"must be https, got {url}"}


# ---- environment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ACCEPTED)
def test_environment_wins_over_the_file(load: Load, key: str) -> None:
    given = {int: 61, str: "/file", tuple: ["storage"]}[KEYS[key]]
    config = load(with_value(key, given), with_variable(key, ACCEPTED[key][-1]))
    assert text_of(config, key) == as_text(ACCEPTED[key][-1])


@pytest.mark.parametrize(
    ("text", "extras"),
    [("qemu", ("qemu",)), (" qemu , storage", ("qemu", "storage")), ("qemu,,storage", None)],
)
def test_extras_in_the_environment_are_separated_by_commas(
    load: Load, text: str, extras: tuple[str, ...] | None
) -> None:
    config = load(VALID, {"FELHOM_AGENT_PROXMOX_EXTRAS": text})
    assert (None if problems(config) else config.proxmox.extras) == extras


@pytest.mark.parametrize(
    "text", ["ten", "1.5", "1e3", "0x10", "1 0", "-", "9" * 5000], ids=lambda text: text[:9]
)
@pytest.mark.parametrize("key", INTEGERS)
def test_variable_that_is_not_an_integer_keeps_the_value_of_the_file(
    load: Load, caplog: pytest.LogCaptureFixture, key: str, text: str
) -> None:
    config = load(with_value(key, 77), with_variable(key, text))
    assert (text_of(config, key), problems(config)) == ("77", {})
    (warning,) = warnings(caplog)
    assert set(with_variable(key, text)) == {word for word in warning.split() if "_" in word}


@pytest.mark.parametrize("seconds", [-5, 0, 59, 60, 900, 3600, 3601, 10**15])
def test_poll_interval_is_clamped_with_a_warning(
    load_value: Load, caplog: pytest.LogCaptureFixture, seconds: int
) -> None:
    key, used = "hub.poll_seconds", min(max(seconds, 60), 3600)
    config = load_value(key, seconds)
    assert (config.hub.poll_seconds, problems(config)) == (used, {})
    told = [key in text and str(used) in text for text in warnings(caplog)]
    assert told == ([] if used == seconds else [True])
    assert (agent.MIN_POLL_SECONDS, agent.MAX_POLL_SECONDS) == (60, 3600)


# ---- problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hub", [None, "x", {}, {"poll_seconds": "x"}, {"ca_file": "x"}], ids=repr)
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
        pytest.param(b'{"hub": {"api_key": "%s"},}', "line 1", id="comma too many"),
        pytest.param(b'{} // "%s"', "line 1 column 4", id="comment"),
        pytest.param(b'{"hub": {"api_key": "%s\n"}}', "line 1", id="line feed in a string"),
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


def test_byte_order_mark_is_no_problem(load: Load) -> None:
    assert load(b"\xef\xbb\xbf" + json.dumps(VALID).encode()) == load(VALID)


# ---- files ---------------------------------------------------------------------------------------


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
    for variable, found in (("", "credential"), (named, "variable")):
        environ["FELHOM_AGENT_CONFIG"] = variable
        assert agent.load_config(None, environ).hub.host_id == found
    assert agent.load_config(option, environ).hub.host_id == "option"


@pytest.mark.skipif(os.path.lexists(agent.DEFAULT_PATH), reason="the default path exists here")
@pytest.mark.parametrize("folder", ["", "/nonexistent"])
def test_file_that_nobody_named_may_be_missing(folder: str) -> None:
    environ = {"FELHOM_AGENT_CONFIG": "", "CREDENTIALS_DIRECTORY": folder}
    config = agent.load_config(None, {**environ, **with_variable("hub.host_id", "x")})
    assert config.hub.host_id == "x"


@pytest.mark.parametrize("by_variable", [False, True], ids=["option", "variable"])
@pytest.mark.parametrize(
    ("name", "problem"),
    [("none", "no such file"), ("", "Is a directory"), ("file/x", "Not a directory")],
    ids=["missing", "directory", "below a file"],
)
def test_file_that_was_named_must_be_readable(
    tmp_path: Path, by_variable: bool, name: str, problem: str
) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / name)
    environ = {"FELHOM_AGENT_CONFIG": path if by_variable else "/nonexistent"}
    with pytest.raises(agent.ConfigError) as caught:
        agent.load_config(None if by_variable else path, environ)
    assert str(caught.value).startswith(f"config: {path}: {problem}")


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700, 0o640, 0o604, 0o644, 0o440], ids=oct)
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


@pytest.mark.parametrize("key", CA_FILES)
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
    ("content", "problem"),
    [(None, "No such file"), ("", "no cert"), ("-----BEGIN CERTIFICATE-----\n", "PEM lib")],
    ids=["missing", "empty", "cut off"],
)
def test_ca_file_without_a_certificate_is_refused(
    tmp_path: Path, content: str | None, problem: str
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content, "ascii")
    told = rf"\.ca_file: {path}: no usable PEM file \({problem}[^;]*$"
    with pytest.raises(agent.ConfigError, match=rf"^config: proxmox{told}"):
        agent.ProxmoxClient(agent.ProxmoxConfig(ca_file=str(path)))
    with pytest.raises(agent.ConfigError, match=rf"^config: hub{told}"):
        agent.HubClient(agent.HubConfig(url="https://h", ca_file=str(path)))


def test_ca_file_of_proxmox_that_is_missing_names_what_provides_it() -> None:
    told = "No such file or directory.*; check systemctl status pve-cluster"
    with pytest.raises(agent.ConfigError, match=told):
        agent.ProxmoxClient(agent.ProxmoxConfig(ca_file="/etc/pve/no-such-ca.pem"))


# ---- secrets -------------------------------------------------------------------------------------


def test_secrets_are_not_in_what_is_shown_of_a_configuration(load: Load) -> None:
    config = load(VALID)
    shown = config.redacted()
    assert (shown["proxmox"]["token_secret"], shown["hub"]["api_key"]) == ("***", "***")
    for text in (repr(config), str(config), repr(config.proxmox), f"{config.hub}", str(shown)):
        assert TOKEN_SECRET not in text
        assert "k3y" not in text


@pytest.mark.parametrize("key", SECRETS)
@pytest.mark.parametrize("secret", BAD_SECRETS, ids=ascii)
def test_refused_secret_is_not_shown(
    load_value: Load, log: pytest.LogCaptureFixture, key: str, secret: str
) -> None:
    config = load_value(key, "hunter2hunter2" + secret)
    assert list(problems(config)) == [key]
    shown = [str(problems(config)), repr(config), str(config.redacted()), log.text]
    assert not [text for text in shown if "hunter2" in text]
