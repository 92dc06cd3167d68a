#!/usr/bin/env bash
# Writes the table of papers into README.md, between its two marker lines, from the front matter of papers/*.md.
#
#   scripts/readme-table.sh            rewrites README.md if the table has changed
#   scripts/readme-table.sh --check    changes nothing; fails and shows the difference if the table is not up to date
set -euo pipefail
cd "$(dirname "$0")/.."

begin='<!-- papers: written by scripts/readme-table.sh -->'
end='<!-- /papers -->'
check=false
case ${1:-} in
    "") ;;
    --check) check=true ;;
    *)
        echo "usage: readme-table.sh [--check], found $1" >&2
        exit 2
        ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Values are one-line TOML strings or integers.
awk '
    function value(line) {
        sub(/^[a-z]+ = /, "", line)
        if (line ~ /^".*"$/) {
            line = substr(line, 2, length(line) - 2)
            gsub(/\\"/, "\"", line)
            gsub(/\\\\/, "\\", line)
        }
        return line
    }
    function cell(text) {
        gsub(/\|/, "\\|", text)
        return text
    }
    FNR == 1 { fences = 0; number = title = status = command = "" }
    $0 == "+++" {
        if (++fences == 2) {
            if (number == "" || title == "" || status == "" || command == "") {
                print FILENAME ": number, title, status or command is missing" > "/dev/stderr"
                exit 1
            }
            printf "| %02d | [%s](%s) | %s | `%s` |\n", number, cell(title), FILENAME, status, cell(command)
        }
        next
    }
    fences != 1 { next }
    /^number = / { number = value($0) }
    /^title = / { title = value($0) }
    /^status = / { status = value($0) }
    /^command = / { command = value($0) }
' papers/[0-9][0-9]-*.md | LC_ALL=C sort >"$work/rows"

pages=(papers/[0-9][0-9]-*.md)
if [[ $(wc -l <"$work/rows") -ne ${#pages[@]} ]]; then
    echo "readme-table.sh: found $(wc -l <"$work/rows") pages with front matter, expected ${#pages[@]}" >&2
    exit 1
fi
for marker in "$begin" "$end"; do
    if [[ $(grep -cxF -e "$marker" README.md) -ne 1 ]]; then
        echo "readme-table.sh: README.md has no line $marker, or several" >&2
        exit 1
    fi
done

{
    sed "/^${begin//\//\\/}\$/q" README.md
    echo
    echo "| # | paper | status | command |"
    echo "|---|---|---|---|"
    cat "$work/rows"
    echo
    sed -n "/^${end//\//\\/}\$/,\$p" README.md
} >"$work/README.md"

if cmp -s "$work/README.md" README.md; then
    exit 0
fi
if $check; then
    echo "readme-table.sh: the table in README.md is not that of papers/*.md; run scripts/readme-table.sh" >&2
    diff README.md "$work/README.md" >&2 || true
    exit 1
fi
cat "$work/README.md" >README.md
