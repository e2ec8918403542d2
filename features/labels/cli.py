"""`loadledger label`: the labels of a model."""

from __future__ import annotations

import click

from loadledger.cli import options, output


@click.command("label")
@options.model_argument()
@click.argument("label", required=False)
@click.argument("version", required=False, type=click.IntRange(min=1))
@click.option("--remove", "removes", is_flag=True, help="Remove LABEL; its version stays.")
@options.json_option
@options.server_options
def label_model(
    model: str,
    *,
    label: str | None,
    version: int | None,
    removes: bool,
    as_json: bool,
    where: options.ServerChoice,
) -> None:
    """List the labels of a model, or let one name a version.

    A label is a name such as champion: a request for that version goes to the version that it names. To
    move a label with the load of its version, use `loadledger load --label`.
    """
    if label is not None and removes is (version is not None):
        raise click.UsageError("give LABEL with a VERSION that it names, or with --remove")
    if label is None and removes:
        raise click.UsageError("give the LABEL that --remove removes")
    with options.open_chosen_client(where) as client:
        if label is not None and removes:
            client.remove_label(model, label)
        elif label is not None and version is not None:
            client.set_label(model, label, version)
        labels = client.model(model).labels
    if label is None and version is not None:
        labels = {each: number for each, number in labels.items() if number == version}
    table = output.format_table(
        ("LABEL", "VERSION"), [(output.format_cell(each), str(labels[each])) for each in labels]
    )
    output.print_result({"labels": labels}, table if labels else ["no labels"], as_json=as_json)
