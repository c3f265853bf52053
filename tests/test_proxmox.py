"""Proxmox as it really is: every family of its answers, what the operator is told, and the diagnosis of the token.

The answers were taken from Proxmox's own daemons (pve-manager 9.2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import felhom_agent as agent
import lab
from support import build_collector, proxmox_config, raw_server

STATUS = "/nodes/pve1/status"
USER = "felhom-agent@pve"
GRANT = f"pveum acl modify / --users {USER} --roles PVEAuditor"
TOKEN = "check proxmox.token_id and proxmox.token_secret; `pveum user token list felhom-agent@pve`"
NODES = "proxmox.node is pve1, but `pvesh get /nodes` lists PVE1, pve2"
LOOKUP = "hostname lookup 'pve1' failed - failed to get address info for: pve1: Temporary failure in name resolution"
PMXCFS = "RPCEnvironment init request failed: Unable to load access control list: Connection refused"
OTHER_NODES = lab.json_reply({"data": [{"node": "pve2", "status": "online"}, {"node": "PVE1", "status": "online"}]})
THIS_NODE = lab.json_reply({"data": [{"node": "pve1", "status": "online"}]})


@pytest.fixture
def plain_node() -> Iterator[lab.SimulatedNode]:
    """Without TLS, which loopback addresses may do."""
    with lab.SimulatedNode(None) as node:
        yield node


def refused(status: int, reason: str, *, body: bool = True) -> lab.Reply:
    """As Proxmox refuses: the text is in the reason phrase, and often in a body too."""
    return lab.json_reply({"data": None, "message": f"{reason}\n"}, status, reason) if body else lab.Reply(status, reason, None)


# --- what was wrong, in the operator's words ----------------------------------------------------------------------------------------

REFUSALS = [
    pytest.param(refused(401, "No ticket", body=False), THIS_NODE, TOKEN, id="no-ticket"),
    pytest.param(refused(401, "Authentication failed!", body=False), THIS_NODE, TOKEN, id="authentication-failed"),
    pytest.param(refused(403, "Permission check failed (/nodes/pve1, Sys.Audit)"), THIS_NODE, GRANT, id="forbidden"),
    pytest.param(refused(500, LOOKUP), OTHER_NODES, NODES, id="lookup-of-an-unknown-node"),
    pytest.param(refused(595, "No route to host", body=False), OTHER_NODES, NODES, id="595-and-an-unknown-node"),
    pytest.param(refused(595, "Connection refused", body=False), OTHER_NODES, NODES, id="595-refused-and-an-unknown-node"),
    pytest.param(refused(596, "Connection timed out", body=False), OTHER_NODES, NODES, id="596-and-an-unknown-node"),
    pytest.param(refused(595, "No route to host", body=False), THIS_NODE, "systemctl status pvedaemon", id="595-and-this-node"),
    pytest.param(refused(595, "Connection refused", body=False), THIS_NODE, "systemctl status pvedaemon", id="pvedaemon-down"),
    pytest.param(refused(599, "Too many redirections", body=False), THIS_NODE, "systemctl status pvedaemon", id="599"),
    pytest.param(refused(500, PMXCFS, body=False), refused(500, PMXCFS, body=False), "systemctl status pve-cluster", id="pmxcfs-down"),
    pytest.param(refused(501, f"Method 'GET {STATUS}' not implemented"), THIS_NODE, "versions 8 and 9 do; check proxmox.url", id="501"),
    pytest.param(refused(400, "Parameter verification failed."), THIS_NODE, "", id="400"),
    pytest.param(refused(500, "something else"), THIS_NODE, "", id="500"),
    pytest.param(refused(500, "Grüße ☃"), THIS_NODE, "", id="reason-in-utf-8"),
    pytest.param(
        lab.Reply(301, "Moved Permanently", b"Moved Permanently", {"Location": "https://x/"}), THIS_NODE, "set proxmox.url", id="301"
    ),
]


@pytest.mark.parametrize(("answer", "nodes", "mend"), REFUSALS)
def test_refusal_says_operation_reason_and_mend(plain_node: lab.SimulatedNode, answer: lab.Reply, nodes: lab.Reply, mend: str) -> None:
    plain_node.script("/nodes$", nodes)
    plain_node.script(STATUS, answer)
    with pytest.raises(agent.HTTPError) as caught:
        build_collector(plain_node).collect()
    text, _, tail = str(caught.value).partition("; ")
    assert text == f"GET {STATUS}: {answer.status} {answer.reason}"
    assert mend in tail
    assert bool(mend) == bool(tail)
    assert caught.value.status == answer.status


def test_reason_that_is_no_utf_8_or_has_control_characters_is_made_fit_for_a_log(plain_node: lab.SimulatedNode) -> None:
    plain_node.script(STATUS, lab.Raw(b"HTTP/1.1 500 caf\xe9 \x1b[31m\xc2\x85 done\r\nContent-Length: 0\r\n\r\n"))
    with pytest.raises(agent.HTTPError) as caught:
        agent.ProxmoxClient(proxmox_config(plain_node)).node_status()
    assert str(caught.value) == f"GET {STATUS}: 500 caf\ufffd \\x1b[31m\\x85 done"


def test_wrong_node_name_is_told_with_the_right_ones(certificates: lab.Certificates) -> None:
    for name in ("nosuch", "PVE2"):
        wrong = pytest.raises(agent.HTTPError, match=f"proxmox.node is {name}, but `pvesh get /nodes` lists pve2")
        with lab.SimulatedNode(certificates, name="pve2") as node, wrong:
            build_collector(node, node=name).collect()


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        pytest.param(b"<!DOCTYPE html><title>pve1 - Proxmox Virtual Environment</title>", "no answer of the Proxmox API", id="html"),
        pytest.param(b"", "no answer of the Proxmox API", id="empty"),
        pytest.param(b"[]", "no answer of the Proxmox API", id="no-object"),
        pytest.param(b"{}", "no answer of the Proxmox API", id="no-data"),
        pytest.param(b'{"data":null}', "no answer of the Proxmox API", id="null"),
        pytest.param(b'{"data":[]}', "no answer of the Proxmox API", id="list-for-object"),
        pytest.param(b'{"data":{"uptime":NaN}}', "no answer of the Proxmox API", id="nan"),
        pytest.param(b'{"data":{"uptime":-Infinity}}', "no answer of the Proxmox API", id="infinity"),
        pytest.param(b'{"data":' + b"[" * 100_000, "no answer of the Proxmox API", id="nested-without-end"),
        pytest.param(b'{"data":{"uptime":' + b"9" * 5000 + b"}}", "no answer of the Proxmox API", id="digits-without-end"),
        pytest.param(b'\x1f\x8b\x08\x00{"data":{}}', "no answer in HTTP", id="gzip"),
    ],
)
def test_answer_of_another_shape_is_told_from_a_failure(plain_node: lab.SimulatedNode, body: bytes, complaint: str) -> None:
    plain_node.script(STATUS, lab.Reply(body=body))
    with pytest.raises(agent.TransportError, match=f"GET {STATUS}: .*{complaint}; check proxmox.url: this is not Proxmox"):
        build_collector(plain_node).collect()


def test_plain_http_port_is_told() -> None:
    with raw_server(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        config = proxmox_config(lab.SimulatedNode(None), url=f"https://127.0.0.1:{port}")
        with pytest.raises(agent.TransportError, match=f"GET {STATUS}: 127.0.0.1:{port}: no TLS there; check the port in proxmox.url"):
            agent.ProxmoxClient(config).node_status()


def test_refused_connection_is_told() -> None:
    with lab.SimulatedNode(None) as node:
        client = agent.ProxmoxClient(proxmox_config(node))
    with pytest.raises(agent.TransportError, match=r"connection refused; check host and port in proxmox.url, and whether pveproxy runs"):
        client.node_status()


def test_secret_that_comes_back_goes_no_further(plain_node: lab.SimulatedNode) -> None:
    secret = plain_node.token_secret
    plain_node.script(STATUS, lab.Reply(500, f"no {secret}"), lab.json_reply({"data": {"pveversion": f"pve-manager/{secret}/x"}}))
    with pytest.raises(agent.HTTPError, match=r"500 no \*\*\*$"):
        build_collector(plain_node).collect()
    assert build_collector(plain_node).collect().host.pve_version == "***"


# --- what every kind of container is reported as ------------------------------------------------------------------------------------

GIB = 1 << 30
SPECS: dict[int, tuple[str, str, int | None, int | None, int | None]] = {
    100: ("web", "running", 2, GIB, 8 * GIB),
    101: ("nocores", "running", 2, GIB, 8 * GIB),  # all of the node's
    102: ("limitonly", "stopped", 2, GIB, 8 * GIB),  # a cpulimit is no number of cores
    103: ("tmpl", "stopped", 1, GIB, 8 * GIB),
    104: ("locked", "stopped", 1, GIB, 8 * GIB),
    105: ("snappy", "stopped", 2, GIB, 8 * GIB),  # four are pending
    106: ("xn--weird-host.Example-1", "running", 2, GIB, 8 * GIB),
    107: ("broken", "stopped", None, None, None),
    108: ("both", "stopped", 4, GIB, 8 * GIB),
    109: ("CT109", "stopped", 2, GIB // 2, 4 * GIB),  # Proxmox's defaults, and what the list says
    110: ("limzero", "stopped", 2, GIB, 8 * GIB),
}


def test_every_kind_of_container_is_reported_as_it_is(node: lab.SimulatedNode) -> None:
    guests = {guest.vmid: guest for guest in build_collector(node).collect().guests}
    assert (guests.pop(999).status, list(guests)) == ("unknown", sorted(SPECS))
    for vmid, guest in guests.items():
        assert guest.spec is not None
        spec = guest.spec
        assert (guest.name, guest.status, spec.cores, spec.memory_bytes, spec.disk_bytes) == SPECS[vmid]


def test_spec_does_not_change_when_a_guest_starts(plain_node: lab.SimulatedNode) -> None:
    plain_node.guests = [lab.Guest(100, "web", status, lab.usual_config(100, "web")) for status in ("stopped",)]
    stopped = build_collector(plain_node).collect().guests[0]
    plain_node.guests[0].status = "running"  # the list's maxdisk is then that of the file system
    running = build_collector(plain_node).collect().guests[0]
    assert (stopped.status, running.status) == ("stopped", "running")
    assert stopped.spec == running.spec


def test_configuration_that_proxmox_mended_is_read(plain_node: lab.SimulatedNode) -> None:
    """A file in Latin-1: Proxmox itself puts U+FFFD for what is no UTF-8."""
    config = lab.usual_config(111, "latin", cores=1, tags="café", description="caf\ufffd latin1\n")
    plain_node.guests = [lab.Guest(111, "caf\ufffd", "stopped", config)]
    (guest,) = build_collector(plain_node).collect().guests
    assert (guest.name, guest.status) == ("caf\ufffd", "stopped")


# --- the token ----------------------------------------------------------------------------------------------------------------------

AUDIT = dict.fromkeys(lab.PRIVILEGES, 1)
FULL = dict.fromkeys(lab.PERMISSION_PATHS, AUDIT)
LACKS_VM = f"token {USER}!agent lacks VM.Audit on /vms; {GRANT}"
LACKS_SYS = f"token {USER}!agent lacks Sys.Audit on /nodes/pve1; {GRANT}"
LACKS_BOTH = f"token {USER}!agent lacks Sys.Audit on /nodes/pve1 and VM.Audit on /vms; {GRANT}"
ONLY_100 = "only these guests are reported, the token has VM.Audit on no others: 100"
NOTHING = f"token {USER}!agent has no rights at all; .*{GRANT} && pveum user token modify {USER} agent --privsep 0"

TOKENS = [
    pytest.param(FULL, True, [], id="full"),
    pytest.param({"/": AUDIT}, True, [], id="on-the-root-alone"),
    pytest.param({"/vms": {"VM.Audit": 1}, "/nodes/pve1": {"Sys.Audit": 1}}, True, [], id="just-what-is-needed"),
    pytest.param({}, False, [NOTHING], id="nothing-at-all"),
    pytest.param({"/": {"Sys.Audit": 1}}, False, [LACKS_VM], id="only-sys-audit"),
    pytest.param({"/": {"VM.Audit": 1}}, True, [LACKS_SYS], id="only-vm-audit"),
    pytest.param({"/vms/100": AUDIT}, False, [LACKS_BOTH, ONLY_100], id="one-guest"),
    pytest.param({"/": {"Sys.Audit": 1}, "/vms/100": AUDIT, "/vms/7": {}}, False, [LACKS_VM, ONLY_100], id="one-guest-and-the-node"),
    pytest.param({"/": dict.fromkeys(AUDIT, 0)}, False, [LACKS_BOTH], id="root-without-propagation"),
    pytest.param({"/": AUDIT, "/vms": dict.fromkeys(AUDIT, 0)}, True, [], id="without-propagation-there-itself"),
    pytest.param({"/": AUDIT, "/nodes": dict.fromkeys(AUDIT, 0)}, True, [], id="without-propagation-between"),
    pytest.param({"/": AUDIT, "/vms": {"VM.Console": 1}}, False, [LACKS_VM, "can do more than read: VM.Console"], id="deeper-overrides"),
    pytest.param({"/": AUDIT, "/nodes/pve1": {"SDN.Audit": 1}}, True, [LACKS_SYS], id="node-overrides"),
    pytest.param({"/": AUDIT, "/nodes/pve2": {"SDN.Audit": 1}}, True, [], id="another-node"),
    pytest.param(
        {"/": {**AUDIT, "VM.PowerMgmt": 1, "Sys.Modify": 0}}, True, ["more than read: Sys.Modify, VM.PowerMgmt; .*PVEAuditor"], id="more"
    ),
    pytest.param({"/": {**AUDIT, "VM.GuestAgent.Audit": 1}}, True, [], id="guest-agent-audit-is-reading"),
    pytest.param({"/": "nonsense", "/vms": [1], "x": None}, False, [LACKS_BOTH], id="nonsense"),
]


@pytest.mark.parametrize(("permissions", "sees_all", "wrong"), TOKENS)
def test_token_is_judged_as_proxmox_does(permissions: Mapping[str, object], sees_all: bool, wrong: list[str]) -> None:
    found_sees_all, found = agent.diagnose_token(permissions, f"{USER}!agent", "pve1")
    assert found_sees_all is sees_all
    assert len(found) == len(wrong)
    for text, pattern in zip(found, wrong, strict=True):
        assert re.search(pattern.replace("(", r"\("), text)


# --- the self-test ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("days", "warns"), [pytest.param(13, True, id="13-days"), pytest.param(15, False, id="15-days"), pytest.param(730, False, id="new")]
)
def test_selftest_shows_the_certificate_and_warns_before_it_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, days: int, warns: bool
) -> None:
    for name in ("JOURNAL_STREAM", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(agent.LOG, "handlers", [])
    certificates = lab.make_certificates(tmp_path, days=days)
    with lab.SimulatedNode(certificates, guests=[]) as node:
        path = tmp_path / "agent.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps({"proxmox": lab.configuration(node, lab.SimulatedHub(None))["proxmox"]}))
        assert agent.main(["--config", str(path), "--selftest=proxmox"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["guests"] == []
    assert "Proxmox VE 9.2.11 at" in captured.err
    assert re.search(
        r"certificate .*commonName=pve1\.example\.lan.*, valid until .* GMT, SHA-256 " + certificates.fingerprint, captured.err
    )
    assert ("the certificate ends in 12 days" in captured.err) is warns
    assert node.token_secret not in captured.out + captured.err
