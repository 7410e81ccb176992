"""python -m musota"""

from musota.workbook.cli import main

if __name__ == "__main__":
    main()
