"""Proxmox's answers: what the operator is told to do about each, and what every token may see.

Status lines and ACLs are those of Proxmox's own daemons (pve-manager 9.2).
"""

from __future__ import annotations

import re
import shlex
from typing import Final

import pytest

import felhom_agent as agent
import lab
from support import make_collector, messages

STATUS: Final = "/nodes/pve1/status"
GONE: Final = "Configuration file 'nodes/pve1/lxc/999.conf' does not exist"
PMXCFS: Final = (
    "RPCEnvironment init request failed: Unable to load access control list: Connection refused"
)


def grant(token_id: str = "felhom-agent@pve!agent") -> str:
    """The command that gives a token what it needs, whether or not it has its own privileges."""
    user = token_id.partition("!")[0]
    return f"pveum acl modify / --users {user} --tokens '{token_id}' --roles PVEAuditor"


# --- errors ---------------------------------------------------------------------------------------

# Of some, Proxmox says nothing but the status line.  The hints for all of them are in
# docs/messages.md, and test_messages.py asks for each.
REFUSALS: Final = [
    (401, "No ticket", False, "pveum user token list felhom-agent@pve"),
    (401, "Authentication failed!", False, "pveum user token list felhom-agent@pve"),
    (403, "Permission check failed (/nodes/pve1, Sys.Audit)", True, grant()),
    (500, GONE, True, "unless a guest was just removed or migrated"),
    (500, PMXCFS, True, "pve-cluster"),
    (595, "No route to host", False, "node pve1"),
    (596, "Connection timed out", False, "systemctl status pvedaemon"),
    (400, "Parameter verification failed.", True, "pveproxy"),
]


@pytest.mark.parametrize(("status", "reason", "has_body", "expected"), REFUSALS)
def test_refusal_says_operation_reason_and_hint(
    plain_node: lab.SimulatedNode, status: int, reason: str, has_body: bool, expected: str
) -> None:
    document = {"data": None, "message": "never shown\n"}
    reply = lab.json_reply(document, status, reason) if has_body else lab.Reply(status, reason)
    plain_node.script(STATUS, reply)
    with pytest.raises(agent.HTTPError) as caught:
        make_collector(plain_node).collect()
    problem, _, hint = str(caught.value).partition("; ")
    assert problem == f"GET {STATUS}: {status} {reason}"
    assert expected in hint
    assert caught.value.status == status
    assert "never shown" not in str(caught.value)


# What a command line would read is quoted.
@pytest.mark.parametrize("user", ["o'brien@ad", "svc$mon@ad", "a`b!@pve"])
def test_user_is_quoted_for_the_shell(plain_node: lab.SimulatedNode, user: str) -> None:
    plain_node.token_id = f"{user}!mon"
    plain_node.script(STATUS, lab.Reply(403, "Permission check failed"), lab.Reply(401, "No"))
    for options in (["--users", user, "--tokens", f"{user}!mon"], ["token", "list", user]):
        with pytest.raises(agent.HTTPError) as caught:
            make_collector(plain_node).collect()
        (command,) = re.findall(r"pveum (?:acl modify|user token).*?(?=;| and )", str(caught.value))
        words = shlex.split(command)
        assert [word for word in options if word not in words] == []


# --- tokens ---------------------------------------------------------------------------------------

AUDITOR: Final = lab.AUDITOR
ON_NODE: Final = ("/nodes/pve1", "PVEAuditor", True)
ON_100: Final = ("/vms/100", "VMAudit", True)


def no_access(path: str, role: str = "NoAccess", propagates: bool = True) -> tuple[str, str, bool]:
    return (path, role, propagates)


NO_SYS_AUDIT: Final = r"\(/nodes/pve1, Sys\.Audit\)"
NO_VM_AUDIT: Final = r"VM\.Audit on /vms"
ALL: Final = [100, 101, 102]
# The ACL of the user, of a token with privilege separation, what the error says, if there is one,
# or the guests in the report and what the warning says.
Tokens = dict[str, tuple[lab.ACL, lab.ACL | None, str, list[int], str]]
TOKENS: Final[Tokens] = {
    "felhom-agent": ([AUDITOR], None, "", ALL, ""),
    "aud_root_noprop": ([no_access("/", "PVEAuditor", False)], None, NO_SYS_AUDIT, [], ""),
    "no101": ([AUDITOR, no_access("/vms/101")], None, "", [100, 102], ""),
    "nobak": ([AUDITOR, no_access("/storage/bak")], None, "", ALL, ""),
    "none": ([], None, NO_SYS_AUDIT, [], ""),
    "nonode": ([AUDITOR, no_access("/nodes/pve1")], None, NO_SYS_AUDIT, [], ""),
    # Pool x gives it 100, pool y 102, for `NoVM` is not NoAccess.
    "novmrole": ([AUDITOR, no_access("/vms", "NoVM")], None, "", [100, 102], NO_VM_AUDIT),
    "novms": ([AUDITOR, no_access("/vms")], None, NO_VM_AUDIT, [], ""),
    "poolx": ([no_access("/pool/x", "PVEAuditor")], None, NO_SYS_AUDIT, [], ""),
    "tokboth": ([AUDITOR], [AUDITOR], "", ALL, ""),
    "toknoacl": ([AUDITOR], [], NO_SYS_AUDIT, [], ""),
    "tokonly": ([], [AUDITOR], NO_SYS_AUDIT, [], ""),
    "vm100": ([ON_100], None, NO_SYS_AUDIT, [], ""),
    # Not among the captured ones.
    "token-on-nodes": ([AUDITOR], [no_access("/nodes", "PVEAuditor")], NO_VM_AUDIT, [], ""),
    "node-and-vm100": ([ON_NODE, ON_100], None, "", [100], NO_VM_AUDIT),
    "what-is-needed": ([ON_NODE, no_access("/vms", "VMAudit")], None, "", ALL, ""),
    "vms-itself-only": (
        [ON_NODE, no_access("/vms", "VMAudit", False)],
        *(None, NO_VM_AUDIT, [], ""),
    ),
    "node-itself-only": (
        [no_access("/nodes/pve1", "PVEAuditor", False), no_access("/vms", "VMAudit")],
        *(None, "", ALL, ""),
    ),
    # Neither concerns a guest.
    "novms-itself": ([AUDITOR, no_access("/vms", "NoAccess", False)], None, "", ALL, ""),
    "vms-role-itself": ([AUDITOR, no_access("/vms", "PVEAuditor", False)], None, "", ALL, ""),
}
# Those that have an entry further down.
OVERRIDDEN: Final = {"nonode", "novmrole", "novms"}


def follow(node: lab.SimulatedNode, message: str) -> None:
    """Do what the one command in a message says, as pveum does."""
    (command,) = re.findall(r"pveum acl modify [^;]*", message)
    assert command == grant(node.token_id)
    for acl in [node.acl, *([] if node.token_acl is None else [node.token_acl])]:
        acl[:] = [entry for entry in acl if entry[:2] != AUDITOR[:2]] + [AUDITOR]


def set_up(node: lab.SimulatedNode, name: str) -> None:
    acl, token_acl, *_ = TOKENS[name]
    node.acl, node.token_acl = [*acl], None if token_acl is None else [*token_acl]
    node.guests = [guest for guest in node.guests if guest.vmid in ALL]
    node.vms = []
    node.pools = {"/vms/100": "x", "/storage/bak": "x", "/vms/102": "y"}


def collect(node: lab.SimulatedNode, *, is_selftest: bool) -> tuple[str, list[int]]:
    """Return the error, or the guests that are reported."""
    try:
        report = make_collector(node).collect(is_selftest=is_selftest)
    except agent.AgentError as exc:
        return str(exc), []
    return "", [guest.vmid for guest in report.guests]


@pytest.mark.parametrize("is_selftest", [False, True], ids=["daemon", "selftest"])
@pytest.mark.parametrize("name", TOKENS)
def test_what_a_token_cannot_see_is_said_and_the_hint_helps(
    plain_node: lab.SimulatedNode, log: pytest.LogCaptureFixture, name: str, is_selftest: bool
) -> None:
    """No guests for want of VM.Audit is an error in every mode, never an empty list."""
    _, _, error, guests, warning = TOKENS[name]
    set_up(plain_node, name)
    found, reported = collect(plain_node, is_selftest=is_selftest)
    assert re.search(error or "^$", found)
    assert reported == guests
    told = [found, *(text for _, text in messages(log))]
    told = [text for text in told if text]
    # One cause, one message; it never widens the token.
    assert len(told) == bool(error or warning)
    assert not [text for text in told if "privsep" in text]
    if not told:
        return
    assert re.search(error or warning, told[0])
    follow(plain_node, told[0])
    log.clear()
    is_solved = collect(plain_node, is_selftest=is_selftest) == ("", ALL) and not messages(log)
    assert is_solved == (name not in OVERRIDDEN)
    if not is_solved:
        # The hint says so: an entry further down overrides what is granted on /.
        assert re.search("; if pveum acl list .*NoAccess.*$", told[0])
        plain_node.acl = [AUDITOR]
        log.clear()
        assert collect(plain_node, is_selftest=is_selftest) == ("", ALL)
        assert messages(log) == []


@pytest.mark.parametrize("flag", [0, 1])
@pytest.mark.parametrize(
    ("path", "privilege", "extras"),
    [
        ("/vms/999999999", "VM.Audit", []),
        ("/storage/999999999", "Datastore.Audit", ["storage"]),
    ],
)
def test_privilege_counts_whether_or_not_it_propagates(
    plain_node: lab.SimulatedNode,
    log: pytest.LogCaptureFixture,
    path: str,
    privilege: str,
    extras: list[str],
    flag: int,
) -> None:
    plain_node.guests, plain_node.vms, plain_node.storages = [], [], []
    reply = lab.json_reply({"data": {path: {privilege: flag}}})
    plain_node.script(f"/access/permissions?path={path}", lab.Forever(reply))
    report = make_collector(plain_node, extras=extras).collect()
    assert (report.guests, report.storage_targets) == ((), ())
    assert messages(log) == []


@pytest.mark.parametrize(
    ("token", "hint"),
    [
        ("root@pam!agent", "use a token of a user of its own"),
        ("agent@pve!agent", "remove every role except PVEAuditor; pveum acl list shows them"),
    ],
)
def test_token_that_can_do_more_than_read_is_told_what_helps(
    log: pytest.LogCaptureFixture, token: str, hint: str
) -> None:
    """root@pam has every privilege, but no role that one could remove."""
    with lab.SimulatedNode(None, token=f"{token}=11111111") as node:
        node.roles["Administrator"] = (*lab.PRIVILEGES, "VM.PowerMgmt")
        node.acl, node.guests, node.vms = [("/", "Administrator", True)], [], []
        collect(node, is_selftest=False)
    ((level, text),) = messages(log)
    assert (level, text.endswith(f"more than read: VM.PowerMgmt; {hint}")) == ("WARNING", True)


def test_all_privileges_are_judged_by_the_selftest_alone(
    plain_node: lab.SimulatedNode, log: pytest.LogCaptureFixture
) -> None:
    plain_node.roles["PVEAdmin"] = (*lab.PRIVILEGES, "VM.PowerMgmt", "Sys.Modify")
    plain_node.acl.append(("/pool/x", "PVEAdmin", True))
    plain_node.guests = lab.many_guests(1)
    plain_node.vms = []
    collect(plain_node, is_selftest=False)
    assert messages(log) == []
    collect(plain_node, is_selftest=True)
    ((level, text),) = messages(log)
    assert (level, "more than read: Sys.Modify, VM.PowerMgmt; " in text) == ("WARNING", True)
    assert "PVEAuditor" in text
