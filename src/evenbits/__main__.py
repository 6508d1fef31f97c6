"""python -m evenbits"""

from evenbits.cli import main

if __name__ == "__main__":
    main()
