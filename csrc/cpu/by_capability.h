// Names that tell apart what is compiled once per CPU capability: FM_CONCAT(stem_, CPU_CAPABILITY).
#pragma once

#define FM_CONCAT_(a, b) a##b
#define FM_CONCAT(a, b) FM_CONCAT_(a, b)
