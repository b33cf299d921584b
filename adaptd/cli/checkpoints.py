"""`adaptd checkpoints`: draft versions on disk; promote and rollback go through the running daemon where there is one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptd.cli.common import ConfigFile, JsonFlag, Sets, load_config, print_json
from adaptd.errors import AdaptdError, DaemonUnavailable

if TYPE_CHECKING:
    from adaptd.config import Config
    from checkpoints.store import CheckpointStore

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def _store(config: Config) -> CheckpointStore:
    from checkpoints.store import CheckpointStore

    return CheckpointStore(config.home / "checkpoints")


@app.command("list")
def list_versions(config: ConfigFile = None, sets: Sets = None, as_json: JsonFlag = False) -> None:
    """All versions, newest last; the live one is marked."""
    store = _store(load_config(config, sets))
    from adaptd.learning.quarantine import refusals

    versions, refused = store.versions(), refusals(store)
    if as_json:
        rows = [{**dataclasses.asdict(m), "quarantine": refused.get(m.version)} for m in versions]
        print_json({"current": store.current(), "versions": rows})
        return
    from adaptd.report.tables import show, versions_table

    show(versions_table(versions, store.current(), refused))


@app.command("show")
def show_version(version: int, config: ConfigFile = None, sets: Sets = None, as_json: JsonFlag = False) -> None:
    """One version: lineage, gate report, data window, tensors."""
    from adaptd.learning.quarantine import refusals
    from checkpoints.errors import CheckpointError

    store = _store(load_config(config, sets))
    try:
        manifest, refused = store.manifest(version), refusals(store).get(version)
    except CheckpointError as error:
        raise AdaptdError(str(error)) from error
    if as_json:
        print_json({**dataclasses.asdict(manifest), "quarantine": refused})
        return
    from adaptd.report.tables import show, version_table

    show(version_table(manifest, refused))


@app.command()
def promote(
    version: int,
    config: ConfigFile = None,
    sets: Sets = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also one that live traffic refused; lifts its quarantine.")
    ] = False,
) -> None:
    """Publish an earlier version's tensors as a new version."""
    _republish(load_config(config, sets), "promote", {"version": version, "force": force})


@app.command()
def rollback(config: ConfigFile = None, sets: Sets = None) -> None:
    """Publish the live version's parent as a new version."""
    _republish(load_config(config, sets), "rollback", {})


def _republish(config: Config, action: str, body: dict[str, Any]) -> None:
    """Ask the daemon, so that its learner follows; without one, write to the store."""
    from adaptd.app.state import find_daemon
    from adaptd.learning import quarantine
    from checkpoints.errors import CheckpointError

    try:
        daemon = find_daemon(config.home)
    except DaemonUnavailable:
        store = _store(config)
        try:
            if action == "promote":
                manifest = quarantine.promote(store, body["version"], force=body["force"])
            else:
                manifest = quarantine.roll_back(store)
        except CheckpointError as error:
            raise AdaptdError(str(error)) from error
        typer.echo(f"version {manifest.version} is live; it has the tensors of version {manifest.restored}")
        return
    import httpx

    token = config.server.admin_token
    headers = {"authorization": f"Bearer {token.get_secret_value()}"} if token else {}
    answer = httpx.post(f"{daemon['url']}/adaptd/checkpoints/{action}", json=body, headers=headers, timeout=120)
    if answer.status_code != 200:
        raise AdaptdError(f"the daemon refused ({answer.status_code}): {answer.json()['error']['message']}")
    typer.echo(f"version {answer.json()['version']} is live")
