"""Asks two databases of known holes about pinned packages: python scripts/audit.py constraints.txt

Exit codes: 0 nothing known, or no database answers (which is said); 1 some package has a hole; 2 pip-audit fails.
"""

import json
import subprocess
import sys

SERVICES = ("osv", "pypi")
UNREACHABLE = ("ConnectionError", "ServiceError", "Timeout", "Max retries", "HTTPError")


def main(file: str) -> int:
    silent = []
    for service in SERVICES:
        packages = ask(service, file)
        if packages is None:
            silent.append(service)
            continue
        return report(packages, service)
    print(f"audit: neither {' nor '.join(silent)} can be reached from here; nothing was audited")
    return 0


def ask(service: str, file: str) -> list[dict] | None:
    """What a database says of each package: its `vulns`, or a `skip_reason`. None where it can't be reached."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", file, "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", service, "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if not asked.stdout:
        if any(word in asked.stderr for word in UNREACHABLE):
            return None
        print(asked.stderr, file=sys.stderr)
        sys.exit(2)
    packages = json.loads(asked.stdout)["dependencies"]
    # A mirror without a database knows none of them.
    return packages if any("vulns" in package for package in packages) else None


def report(packages: list[dict], service: str) -> int:
    holes = [(package, hole) for package in packages for hole in package.get("vulns", [])]
    for package, hole in holes:
        fixed = ", ".join(hole["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {hole['id']}, closed in {fixed}")
    for package in packages:
        if "skip_reason" in package:
            print(f"{package['name']}: not audited: {package['skip_reason']}")
    print(f"audit: {len(packages)} packages, {len(holes)} known holes ({service})")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
