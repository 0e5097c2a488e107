"""The sample exports are what the stated rule makes of the full ones."""

from pathlib import Path

from data_schemas.layout import load_layout
from hospital_node.cut_exports import DAYS, cut_site

SAMPLES = Path(__file__).parents[2] / "hospital_node" / "sample_exports"


def test_the_first_dates_are_kept_byte_for_byte(tmp_path: Path) -> None:
    """Lines of the first dates with glucose stay as they are in every file; a file without any is not written."""
    source, cut = tmp_path / "full", tmp_path / "cut"
    glucose, meals, bolus = (source / name for name in ("Glucose Data", "Nutrition Data", "Insulin Data/Bolus Data"))
    basal = source / "Insulin Data/Basal Data"
    for folder in (glucose, meals, bolus, basal):
        folder.mkdir(parents=True)
    (glucose / "UoMGlucose1.csv").write_bytes(
        b"bg_ts,value\r\n02/10/2023 23:58,7.50\r\n04/10/2023 00:01,8\r\n02/10/2023 23:58,7.6\r\n05/10/2023 00:01,9\r\n"
    )
    (meals / "UoMNutrition1.csv").write_bytes(
        b"\xef\xbb\xbfmeal_ts,carbs_g\r\n03/10/2023 08:00,9\r\n04/10/2023 08:00,10\r\n05/10/2023 08:00,11"
    )
    (bolus / "UoMBolus1.csv").write_bytes(b"bolus_ts,bolus_dose\n03/10/2023 08:00,1\n")
    (basal / "UoMBasal1.csv").write_bytes(b"basal_ts,basal_dose,insulin_kind\n02/10/2023 08:00,1,R\n")

    written = cut_site(source, cut, load_layout("manchester"), 2)

    files = {path.relative_to(cut).as_posix(): path.read_bytes() for path in cut.rglob("*.csv")}
    assert files == {
        "Glucose Data/UoMGlucose1.csv": (
            b"bg_ts,value\r\n02/10/2023 23:58,7.50\r\n04/10/2023 00:01,8\r\n02/10/2023 23:58,7.6\r\n"
        ),
        "Nutrition Data/UoMNutrition1.csv": b"\xef\xbb\xbfmeal_ts,carbs_g\r\n04/10/2023 08:00,10\r\n",
        "Insulin Data/Basal Data/UoMBasal1.csv": b"basal_ts,basal_dose,insulin_kind\n02/10/2023 08:00,1,R\n",
    }
    assert written == sum(map(len, files.values()))


def test_cutting_the_samples_again_changes_nothing(tmp_path: Path) -> None:
    """What ships already is the cut: the rule applied to it keeps every byte."""
    for site in ("mostoles", "duke"):
        cut_site(SAMPLES / site, tmp_path / site, load_layout(site), DAYS[site])
        assert {path.name: path.read_bytes() for path in (tmp_path / site).iterdir()} == {
            path.name: path.read_bytes() for path in (SAMPLES / site).iterdir()
        }


def test_the_samples_stay_small() -> None:
    """All six together stay below 10 MB."""
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 10_000_000
