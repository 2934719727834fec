// What an operator of real space is told besides its tensors: the numbers of attention/settings.py, in their order.
#pragma once

#include "bindings.h"

namespace crystalformer {

struct Settings {
    double tol;           // largest fraction of the weight that may be left out
    double tf32;          // nothing here multiplies in tf32
    double r_max, width;  // of the radial basis
    double of_orbits;     // whether the image list is one of orbits

    static Settings read(List<double> numbers) {
        CHECK_VALUE(numbers.size() == 5, "settings must be tol, tf32, r_max, width, of_orbits, not ", numbers);
        return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
    }
};

}  // namespace crystalformer
