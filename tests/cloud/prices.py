"""What hosts cost in the local cloud, and the two services that tell."""

import json
from datetime import UTC, datetime
from typing import Any

ON_DEMAND = {"p3dn.24xlarge": 31.212, "p4d.24xlarge": 21.9576, "p5.48xlarge": 55.04}
"""USD an hour; other types cost by their number of processors."""
_PER_VCPU = 0.05
_SPOT = 0.3
"""A spot host in zone a costs this part of the on-demand price, and a little more in later ones."""


def on_demand(kind: str, vcpus: int) -> float:
    """USD an hour."""
    return ON_DEMAND.get(kind, round(_PER_VCPU * vcpus, 4))


def spot(kind: str, vcpus: int, zone: str) -> float:
    """USD an hour."""
    return round(on_demand(kind, vcpus) * (_SPOT + 0.02 * (ord(zone[-1]) - ord("a"))), 4)


def spot_history(kind: str, vcpus: int, zone: str) -> dict[str, Any]:
    """An entry as in DescribeSpotPriceHistory."""
    return {
        "InstanceType": kind,
        "ProductDescription": "Linux/UNIX",
        "SpotPrice": f"{spot(kind, vcpus, zone):.6f}",
        "AvailabilityZone": zone,
        "Timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
    }


def product(kind: str, vcpus: int, region: str) -> str:
    """An entry of the price list, as GetProducts returns it: JSON in a string."""
    dimension = {
        "unit": "Hrs",
        "pricePerUnit": {"USD": f"{on_demand(kind, vcpus):.10f}"},
        "description": f"${on_demand(kind, vcpus)} per On Demand Linux {kind} Instance Hour",
    }
    term = {"priceDimensions": {"SKU.JRTCKXETXF.6YS6EN2CT7": dimension}, "sku": "SKU"}
    attributes = {
        "instanceType": kind,
        "regionCode": region,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
        "licenseModel": "No License required",
        "servicecode": "AmazonEC2",
    }
    return json.dumps(
        {
            "product": {
                "productFamily": "Compute Instance",
                "attributes": attributes,
                "sku": "SKU",
            },
            "serviceCode": "AmazonEC2",
            "terms": {"OnDemand": {"SKU.JRTCKXETXF": term}},
        }
    )
